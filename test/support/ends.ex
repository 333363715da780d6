defmodule VLLM.Ends do
  @moduledoc "How calls to the fake worker end: what each is, as its prompt and its options."

  @doc "Of calls that are let in and asked of a worker that lives."
  def all do
    [
      result: {"reply:x", []},
      error: {"error:internal", []},
      deadline: {"hold", [timeout: 100]},
      late: {"late:x", [timeout: 100]},
      unknown_id: {"unknown:x", []},
      second_answer: {"duplicate:x", []},
      malformed_answer: {"malformed", []},
      garbage: {"garbage", []},
      half_a_frame: {"truncated", []},
      too_long: {"oversized", []},
      death: {"kill", []},
      death_and_retry: {"kill", [retry: true]},
      not_sendable: {"x", [sampling_params: [extra_args: %{"n" => 2 ** 70}]]},
      unknown_option: {"x", [no_such_option: 1]}
    ]
  end
end
