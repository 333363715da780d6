defmodule VLLM.Quantization.Detected do
  @fields [
    method: "vLLM's name of the quantization method (`\"gptq\"`); nil for a plain model",
    quant_method: "what the checkpoint itself calls it"
  ]

  @moduledoc """
  How a model is quantized, from `VLLM.Quantization.detect/2`.

  #{Enum.map_join(@fields, "\n", fn {name, doc} -> "  * `:#{name}` - #{doc}" end)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{}

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    struct!(__MODULE__, for(name <- @names, do: {name, wire[Atom.to_string(name)]}))
  end
end
