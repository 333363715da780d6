defmodule VLLM.Quantization.Method do
  alias VLLM.Fields
  alias VLLM.Quantization.Format

  @fields [
    name: "vLLM's name of it, for `quantization:`",
    title: "how people write it (`\"AutoRound\"`)",
    other_names: "by which it can be named as well",
    bits: "that its weights may have, as far as that is known",
    formats: "the usual formats of its checkpoints, as `VLLM.Quantization.Format`s",
    pre_quantized?: "whether it loads checkpoints that were quantized with it",
    in_flight:
      "what it makes of a plain model while that is loaded, as a `VLLM.Quantization.Format`; nil " <>
        "where it only loads checkpoints",
    dtype: "the `dtype:` of an engine that means the same; nil for most",
    extra: "what must be installed for it: `mix vllm.setup --with EXTRA`; nil for nothing",
    installed?: "whether that is",
    capability: "the least compute capability of NVIDIA's GPUs (`7.5`); nil where vLLM has none",
    runs?:
      "whether anything of it runs on this device; nil where one layer does not tell, which " <>
        "`VLLM.Quantization.check/2` can with a model",
    why_not: "why nothing of it runs, or cannot be told; else nil",
    note: "what to know before it is chosen; or nil"
  ]

  @moduledoc """
  A quantization method of the installed vLLM, from `VLLM.Quantization.methods/1`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          name: String.t(),
          title: String.t(),
          other_names: [String.t()],
          bits: [number()],
          formats: [Format.t()],
          pre_quantized?: boolean(),
          in_flight: Format.t() | nil,
          dtype: String.t() | nil,
          extra: String.t() | nil,
          installed?: boolean(),
          capability: float() | nil,
          runs?: boolean() | nil,
          why_not: String.t() | nil,
          note: String.t() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    method = struct!(__MODULE__, Fields.take(wire, @names))

    %{
      method
      | formats: Enum.map(method.formats, &Format.from_wire/1),
        in_flight: method.in_flight && Format.from_wire(method.in_flight)
    }
  end

  # Bits such as `[8]` are no text.
  defimpl Inspect do
    def inspect(method, opts), do: Inspect.Any.inspect(method, %{opts | charlists: :as_lists})
  end
end
