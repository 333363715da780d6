defmodule VLLM.Quantization.Finding do
  alias VLLM.{Error, Fields, Options}

  @fields [
    severity:
      "`:error` for what keeps an engine from starting, `:warning` for what is probably not meant, " <>
        "`:info` for what is good to know",
    reason:
      "what it is about: of an error the `:reason` of the `VLLM.Error` that `VLLM.llm/2` would end " <>
        "with; of what is good to know `:family` (what the model is for), `:device` (what only " <>
        "the device can tell) or `:isq` (what is made of the model before it is loaded)",
    message: "what is the matter",
    remedy: "what to do about it; `\"\"` where there is nothing to do",
    details: "a map with string keys, for programs, as in `VLLM.Error`"
  ]

  @moduledoc """
  Something to know of a model before it is loaded, from `VLLM.Quantization.check/2`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  @enforce_keys @names
  defstruct @names

  @type t :: %__MODULE__{
          severity: :error | :warning | :info,
          reason: atom(),
          message: String.t(),
          remedy: String.t(),
          details: map()
        }

  # Reasons of no error; python/vllm_bridge/engine/finding.py has them too.
  @notes %{"family" => :family, "device" => :device, "isq" => :isq}

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    error = about(wire)
    {remedy, details} = Map.pop(error.details, "remedy", wire["remedy"])

    %__MODULE__{
      severity: severity(wire["severity"]),
      reason: error.reason,
      message: error.message |> String.replace_suffix(remedy, "") |> String.trim_trailing(),
      remedy: remedy,
      details: details
    }
  end

  defp about(%{"reason" => note} = wire) when is_map_key(@notes, note),
    do: Error.new(@notes[note], wire["message"], wire["details"])

  # As the error of a start is told.
  defp about(wire),
    do: wire |> Error.from_wire() |> Options.or_ours(Options.tools() ++ Options.machine())

  defp severity("error"), do: :error
  defp severity("warning"), do: :warning
  defp severity("info"), do: :info
end
