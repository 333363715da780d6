defmodule VLLM.Quantization.Finding do
  @fields [
    severity:
      "`:error` for what keeps an engine from starting, `:warning` for what is probably not meant, " <>
        "`:info` for what is good to know",
    reason:
      "what it is about, as in `VLLM.Error`: of an error the `:reason` that `VLLM.llm/2` would " <>
        "end with",
    message: "what is the matter",
    remedy: "what to do about it; `\"\"` where there is nothing to do",
    details: "a map with string keys, for programs, as in `VLLM.Error`"
  ]

  @moduledoc """
  Something to know of a model before it is loaded, from `VLLM.Quantization.check/2`.

  #{Enum.map_join(@fields, "\n", fn {name, doc} -> "  * `:#{name}` - #{doc}" end)}
  """

  alias VLLM.Error

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

  # An error's message has both sentences; a finding has each by itself.
  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    error = Error.from_wire(wire)

    %__MODULE__{
      severity: severity(wire["severity"]),
      reason: error.reason,
      message: error.message,
      remedy: wire["remedy"],
      details: error.details
    }
  end

  defp severity("error"), do: :error
  defp severity("warning"), do: :warning
  defp severity("info"), do: :info
end
