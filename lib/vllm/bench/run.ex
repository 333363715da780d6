defmodule VLLM.Bench.Run do
  alias VLLM.Bench.Figures
  alias VLLM.Fields

  @fields [
    engine: "what tells the engine from the others",
    model: "its model, as it was named",
    quantization: "its quantization method; nil for none",
    kv_cache_dtype: "of its KV cache",
    device: "the device's name",
    replicas: "how many workers it had",
    max_concurrency: "how many requests were under way at most; nil where there was no limit",
    startup_seconds:
      "how long its start took, download and compilation included; nil of an engine that ran before",
    memory:
      "bytes of the machine's memory that the engine's processes held after the rounds, where what they " <>
        "share counts once. That of a GPU is not in it. Nil where it is not known",
    figures:
      "a `VLLM.Bench.Figures`: of each figure the median of the rounds, of counts (requests and tokens) the sum",
    rounds: "a `VLLM.Bench.Figures` for each round",
    output_throughput:
      "the median output tokens per second of the rounds and the ends of its 95 % interval, as " <>
        "`{median, low, high}`",
    ratio:
      "the same of what each round had of the first engine's output tokens per second in the same round; nil " <>
        "of the first engine itself, and where that had none"
  ]

  @moduledoc """
  What was measured of one engine at one `max_concurrency`, a row of `VLLM.Bench`.

  #{Fields.docs(@fields)}

  Intervals are by bootstrap over the rounds. Of three rounds they are hardly more than the least and the
  most: take 15 and more to tell engines apart that are as near as that.
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type interval :: {median :: float(), low :: float(), high :: float()}

  @type t :: %__MODULE__{
          engine: String.t(),
          model: String.t(),
          quantization: String.t() | nil,
          kv_cache_dtype: String.t() | nil,
          device: String.t() | nil,
          replicas: pos_integer(),
          max_concurrency: pos_integer() | nil,
          startup_seconds: float() | nil,
          memory: pos_integer() | nil,
          figures: Figures.t(),
          rounds: [Figures.t(), ...],
          output_throughput: interval(),
          ratio: interval() | nil
        }
end
