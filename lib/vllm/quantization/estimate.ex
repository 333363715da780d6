defmodule VLLM.Quantization.Estimate do
  @fields [
    model: "the folder, file or hub name that was asked about",
    method: "the quantization method, by vLLM's name; nil for a plain model",
    dtype: "what the model computes in (`\"bfloat16\"`)",
    fits?:
      "whether there is room for the weights, what vLLM needs beside them, and `:concurrency` requests of " <>
        "`:max_model_len` tokens",
    max_model_len:
      "tokens that prompt and completion may have together: as asked, else the model's own",
    concurrency: "requests of that length that are to fit at a time",
    tensor_parallel_size: "devices that each layer is split over",
    pipeline_parallel_size: "devices that the layers are dealt out to",
    data_parallel_size: "how often there is the whole, experts divided among all",
    weights: "of all devices together, see below",
    kv_cache: "of one device, see below",
    devices: "what each device holds, in the order of vLLM's ranks; see below",
    longest_context:
      "the longest `:max_model_len` for which `:concurrency` requests fit, up to the model's own; 0 where " <>
        "not even the weights do",
    max_concurrency:
      "requests of `:max_model_len` tokens that fit at a time; nil for a model that keeps nothing of them",
    tokens_per_second:
      "of one request, what the bandwidth of the memory allows at most: for each token all weights that " <>
        "compute it are read. It is a limit and no forecast; nil where no bandwidth is known",
    remedies: "where it does not fit, changes by each of which alone it does; see below",
    formats:
      "what a plain model takes as it is and would take in other formats, the largest first; see below"
  ]

  @weights [
    disk: "in the model's files",
    memory: "once they are loaded",
    peak: "the most of it while they are loaded",
    linear: "of `:memory`, matrices of attention and of MLPs",
    embeddings: "of `:memory`, those of tokens and the output layer",
    experts: "of `:memory`, those of mixtures",
    others: "of `:memory`, norms, and parts for pictures and sound"
  ]

  @kv_cache [
    dtype: "the option `kv_cache_dtype`",
    bytes_per_token: "of the layers that keep every token",
    bytes: "what `:concurrency` requests of `:max_model_len` tokens take",
    available: "what is left for it",
    tokens:
      "that fit into what is left, in requests of `:max_model_len`: vLLM's \"KV cache size\"",
    approximate?: "whether the model has caches that are not known in detail"
  ]

  @device [
    name: "as its vendor calls it, or as it was named",
    kind: "of vLLM's platforms (`\"cuda\"`); `\"gpu\"` where only the size is known",
    memory: "that programs can have",
    source: "where that is from",
    budget: "what the engine takes of it, by `gpu_memory_utilization`",
    weights: "of the model",
    adapters: "room for LoRA adapters",
    draft: "weights of a model that proposes tokens",
    activations: "the tensors of one step",
    framework: "what stays of vLLM, torch and the driver",
    kv_cache: "what the requests take",
    left: "what is left then; negative where it does not fit",
    fits?: "whether it does"
  ]

  @remedy [
    text: "in words",
    options: "engine options to give, a map of strings; empty where it is something else",
    format: "the format to have the model in, one of `:formats`; nil where it is something else",
    devices: "how many devices there must be; nil where it is something else"
  ]

  @format [
    method: "vLLM's name of it; nil for a plain one",
    name: "what people call it (`\"awq (4 bits)\"`, `\"Q4_K_M\"`)",
    disk: "of its files",
    memory: "of its weights once they are loaded, where the device has a kernel for them",
    fits?: "whether it would fit on these devices, with the same context and requests"
  ]

  alias VLLM.Fields

  @moduledoc """
  How much memory a model takes, from `VLLM.Quantization.estimate/2`. All sizes are bytes.

  #{Fields.docs(@fields)}

  `:weights` is a map:

  #{Fields.docs(@weights)}

  `:kv_cache` is a map:

  #{Fields.docs(@kv_cache)}

  `:devices` is a list of maps:

  #{Fields.docs(@device)}

  `:remedies` is a list of maps:

  #{Fields.docs(@remedy)}

  `:formats` is a list of maps; empty for a model that is quantized:

  #{Fields.docs(@format)}
  """

  @names Keyword.keys(@fields)
  @enforce_keys @names
  defstruct @names

  @type t :: %__MODULE__{
          model: String.t(),
          method: String.t() | nil,
          dtype: String.t() | nil,
          fits?: boolean(),
          max_model_len: pos_integer(),
          concurrency: pos_integer(),
          tensor_parallel_size: pos_integer(),
          pipeline_parallel_size: pos_integer(),
          data_parallel_size: pos_integer(),
          weights: %{atom() => non_neg_integer()},
          kv_cache: %{atom() => term()},
          devices: [%{atom() => term()}],
          longest_context: non_neg_integer(),
          max_concurrency: non_neg_integer() | nil,
          tokens_per_second: float() | nil,
          remedies: [%{atom() => term()}],
          formats: [%{atom() => term()}]
        }

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    estimate = struct!(__MODULE__, Fields.take(wire, @names))

    %{
      estimate
      | weights: take(wire["weights"], @weights),
        kv_cache: take(wire["kv_cache"], @kv_cache),
        devices: Enum.map(wire["devices"], &take(&1, @device)),
        remedies: Enum.map(wire["remedies"], &take(&1, @remedy)),
        formats: Enum.map(wire["formats"], &take(&1, @format))
    }
  end

  defp take(wire, fields), do: Fields.take(wire, Keyword.keys(fields))
end
