defmodule VLLM.Quantization.Report do
  alias VLLM.Fields

  @fields [
    ok?: "whether nothing was found that keeps an engine from starting",
    findings: "a list of `VLLM.Quantization.Finding`, in the order in which a start meets them",
    model: "the folder, file or hub name that was asked about",
    model_type: "as its config names it (`\"llama\"`)",
    architecture: "the class that vLLM runs it with (`\"LlamaForCausalLM\"`)",
    family:
      "what kind of model it is: `\"text\"`, `\"vision\"`, `\"audio\"`, `\"embedding\"`, `\"reranker\"`, " <>
        "`\"classifier\"`, `\"token classifier\"`, `\"reward\"`, `\"late interaction\"`; what vLLM is not for, " <>
        "such as `\"diffusion\"`, is an error among the findings; nil where it is not known",
    capabilities:
      "what it can be asked for, by the names of functions of `VLLM` (`\"generate\"`, `\"chat\"`, " <>
        "`\"embed\"`, …), and `\"images\"`, `\"tools\"`, `\"reasoning\"`",
    method: "the quantization method, by vLLM's name; nil for a plain model",
    kernel:
      "what computes quantized linear layers on this device; nil for a plain model, and where " <>
        "an error or another device leaves it unknown",
    dtype: "of what is not quantized, and of what is computed (`\"bfloat16\"`)",
    kv_cache_dtype: "of the KV cache; `\"auto\"` is the model's dtype",
    max_model_len: "tokens that prompt and completion may have together",
    max_num_seqs: "requests that are computed together at most",
    tensor_parallel_size: "devices that each layer is split over",
    pipeline_parallel_size: "devices that the layers are dealt out to",
    runner: "`\"generate\"`, or `\"pooling\"` for what embeds, classifies and scores",
    loaded_bytes: "the least that the weights take in memory, in bytes; 0 where it is not known",
    device: "the platform of the devices (`\"cuda\"`, `\"cpu\"`, …)",
    vllm_version: "of the vLLM that was asked"
  ]

  @moduledoc """
  What would be of a model if it were loaded, from `VLLM.Quantization.check/2`.

  #{Fields.docs(@fields)}

  After an error, what only vLLM can tell is nil (such as `:max_model_len`).
  """

  alias VLLM.Quantization.Finding

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{
          ok?: boolean(),
          findings: [Finding.t()],
          model: String.t(),
          model_type: String.t() | nil,
          architecture: String.t() | nil,
          family: String.t() | nil,
          capabilities: [String.t()],
          method: String.t() | nil,
          kernel: String.t() | nil,
          dtype: String.t() | nil,
          kv_cache_dtype: String.t() | nil,
          max_model_len: pos_integer() | nil,
          max_num_seqs: pos_integer() | nil,
          tensor_parallel_size: pos_integer() | nil,
          pipeline_parallel_size: pos_integer() | nil,
          runner: String.t() | nil,
          loaded_bytes: non_neg_integer(),
          device: String.t() | nil,
          vllm_version: String.t() | nil
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    report = struct!(__MODULE__, Fields.take(wire, @names))
    %{report | findings: Enum.map(report.findings, &Finding.from_wire/1)}
  end
end
