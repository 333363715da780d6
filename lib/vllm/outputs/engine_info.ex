defmodule VLLM.EngineInfo do
  alias VLLM.Fields

  @fields [
    model: "the folder or hub id",
    model_type: "the family, as its config names it (`\"llama\"`)",
    architecture: "the class that vLLM runs it with (`\"LlamaForCausalLM\"`)",
    dtype: "of weights and activations (`\"bfloat16\"`)",
    quantization: "the method that vLLM runs, as detected or given; nil for none",
    quantization_config: "what the checkpoint says of its quantization, as a map, or nil",
    quantization_note: "what is to be known of how it is computed here, in a sentence, or nil",
    quantization_kernel:
      "the kernel of vLLM that computes quantized linear layers, or the method where it has no " <>
        "separate one; nil for none",
    kv_cache_dtype: "of the KV cache; `\"auto\"` is the model's dtype",
    kv_cache_tokens: "tokens that the KV cache holds, of all requests together",
    kv_cache_bytes: "its size, where it was given; else nil",
    max_model_len: "tokens that prompt and completion may have together",
    max_num_seqs: "requests that are computed together at most",
    tensor_parallel_size: "devices that each layer is split over",
    pipeline_parallel_size: "devices that the layers are dealt out to",
    data_parallel_size: "copies of the model inside the engine",
    distributed_executor_backend:
      "how vLLM runs the model: `\"uni\"` in the process of its engine core, which is the default on " <>
        "up to 4 CPU cores, `\"mp\"` in a process for each device, `\"ray\"`",
    vllm_version: "the installed vLLM",
    device: "`\"cuda\"`, `\"cpu\"`, …",
    device_name: "the device's own name",
    runner: "`\"generate\"` or `\"pooling\"`",
    tasks: "what the engine can do, as vLLM names it",
    pooling_task: "the one of them that it does, with the pooling runner; else nil",
    labels: "the names of a classifier's classes, by index; else nil",
    load_seconds: "how long it took to load"
  ]

  @moduledoc """
  What an engine is, from `VLLM.engine_info/2`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{}

  @doc false
  @spec from_wire(map()) :: t()
  def from_wire(wire) do
    struct!(__MODULE__, Fields.take(wire, @names))
  end
end
