defmodule VLLM.Quantization.Detected do
  alias VLLM.Fields
  alias VLLM.Quantization.Adapter

  @fields [
    method:
      "vLLM's name of the quantization method (`\"gptq\"`), or what the checkpoint calls it where " <>
        "vLLM has no such method; nil for a plain model and for an adapter",
    title: "how people write it (`\"GPTQ\"`)",
    made_for:
      "the program whose own format it is, where vLLM does not load it (`\"ExLlamaV2\"`); else nil",
    format:
      "how it is stored, in the method's words: `\"gptq_v2\"`, `\"gemm\"`, `\"pack-quantized\"`, `\"nf4\"`, " <>
        "`\"Q4_K_M\"`",
    bits:
      "bits of each quantized weight, without its part of the scales; the average where layers differ",
    bits_per_weight:
      "bits that a weight takes in the files on average, with scales and with layers that are not " <>
        "quantized",
    group_size:
      "weights that share a scale, -1 for all of a row or column; of blocks the length of a side",
    strategy: "what has a scale: `\"group\"`, `\"channel\"`, `\"block\"` or `\"tensor\"`",
    symmetric: "whether zero is in the middle, so that there are no zero points",
    desc_act: "whether inputs are stored in the order of their activations",
    activation_bits: "where activations are quantized too",
    activations: "their scales: `\"static\"` or `\"dynamic\"`",
    kv_cache: "what the checkpoint means the KV cache to be quantized to (`\"fp8\"`)",
    ignored:
      "layers that are left as they are, as a list of names or patterns, in the method's words",
    producer:
      "what made it, with its version where it is signed (`\"GPTQModel 7.6.0\"`); what does not sign " <>
        "is known by its habits",
    dtype: "what the model computes in, by its config (`\"bfloat16\"`)",
    parameters:
      "weights, with packed ones counted as what they stand for; nil where no headers could be read, " <>
        "as of files of before torch 1.6",
    bytes: "bytes of the tensors in its files; nil like `:parameters`",
    architecture: "the class that its config names (`\"LlamaForCausalLM\"`)",
    model_type: "the family, as its config names it (`\"llama\"`)",
    base_model: "the model on the hub that it was made of, as far as it says so",
    adapter: "a `VLLM.Quantization.Adapter`, for what is an adapter and no model of its own"
  ]

  @moduledoc """
  What a model is and how it is quantized, from `VLLM.Quantization.detect/2`.

  What a checkpoint says nothing of is nil.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          method: String.t() | nil,
          title: String.t() | nil,
          made_for: String.t() | nil,
          format: String.t() | nil,
          bits: number() | nil,
          bits_per_weight: float() | nil,
          group_size: integer() | nil,
          strategy: String.t() | nil,
          symmetric: boolean() | nil,
          desc_act: boolean() | nil,
          activation_bits: pos_integer() | nil,
          activations: String.t() | nil,
          kv_cache: String.t() | nil,
          ignored: [String.t()],
          producer: String.t() | nil,
          dtype: String.t() | nil,
          parameters: pos_integer() | nil,
          bytes: pos_integer() | nil,
          architecture: String.t() | nil,
          model_type: String.t() | nil,
          base_model: String.t() | nil,
          adapter: Adapter.t() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    detected = struct!(__MODULE__, Fields.take(wire, @names))
    %{detected | adapter: detected.adapter && Adapter.from_wire(detected.adapter)}
  end
end
