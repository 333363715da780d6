defmodule VLLM.Job.Output do
  @fields [
    label:
      "what it is called among the outputs of its job: `\"Q4_K_M\"`, `\"gptq-4bit-128g\"`, …",
    format:
      "the format, by vLLM's name of it: `\"gguf\"`, `\"gptq\"`, …; `\"adapter\"` of a fine-tuning",
    options: "all options that it is made with, defaults included: a map with string keys",
    state:
      "`:waiting`, `:quantizing` (or `:training`), `:verifying`, `:registering`, `:done` or `:failed`",
    name: "what `VLLM.llm!/2` finds it by once it is done: `\"llama:Q4_K_M\"`",
    path: "its folder once it is done",
    bytes: "its size on the disk",
    files: "the names of its files with their sizes",
    seconds: "how long it took to make, without its verification",
    peak_memory_bytes: "the most memory that making it took",
    libraries: "what made it: versions by names",
    calibration:
      "the texts that it was calibrated with (`\"source\"`, `\"texts\"`, `\"tokens\"`); nil where it took none",
    notes: "what else is to be known of it: a list of sentences",
    quality:
      "what was lost, against the source, by the names of `VLLM.Quantization.compare/2`: a map with " <>
        "string keys; nil where it was not verified",
    figures: "what else its step tells of it, by its own names",
    error: "the `VLLM.Error` of one that failed"
  ]

  @moduledoc """
  One of the models that a job makes.

  #{VLLM.Fields.docs(@fields)}
  """

  alias VLLM.Error

  @enforce_keys [:label, :format]
  defstruct [
    :label,
    :format,
    :name,
    :path,
    :bytes,
    :seconds,
    :peak_memory_bytes,
    :calibration,
    :quality,
    :error,
    options: %{},
    state: :waiting,
    files: %{},
    libraries: %{},
    notes: [],
    figures: %{}
  ]

  @type t :: %__MODULE__{
          label: String.t(),
          format: String.t(),
          options: %{String.t() => term()},
          state: :waiting | :quantizing | :training | :verifying | :registering | :done | :failed,
          name: String.t() | nil,
          path: Path.t() | nil,
          bytes: non_neg_integer() | nil,
          files: %{String.t() => non_neg_integer()},
          seconds: number() | nil,
          peak_memory_bytes: non_neg_integer() | nil,
          libraries: %{String.t() => String.t()},
          calibration: map() | nil,
          notes: [String.t()],
          quality: map() | nil,
          figures: %{String.t() => term()},
          error: Error.t() | nil
        }
end
