defmodule VLLM.Quantization do
  import VLLM.Error, only: [bang!: 1]

  alias VLLM.{Error, Options, Tools}
  alias VLLM.Quantization.{Advice, Comparing, Comparison, Detected, Estimate, Method, Report}

  @moduledoc """
  What there is to know of a model and its quantization before it is loaded.

      {:ok, detected} = VLLM.Quantization.detect("/models/Mistral-7B-AWQ")
      detected.method
      #=> "awq"

  A model is what `VLLM.llm/2` takes, and so are the options: those of an engine, checked in the same
  way. No weights are read, and no engine is started: each question is answered by a Python process
  of its own, within a second or two (`check/2` imports vLLM, which takes longer). Of this library's
  own options these have a meaning here: `:python`, `:env` and `:allowed_models`, as of an engine, and

  #{Options.docs(Options.tools())}
  """

  @doc """
  What a model is and how it is quantized, from its config and the headers of its files; or, of an
  adapter, what the adapter is. Of one on the hub nothing else is fetched.

  Errors are those of the model: `:model_not_found`, `:not_a_model`, `:model_gated`,
  `:hub_unreachable`, `:invalid_checkpoint`. That a quantization cannot be computed here is none:
  `check/2` tells that.

      {:ok, %VLLM.Quantization.Detected{method: "gptq", bits: 4, group_size: 128}} =
        VLLM.Quantization.detect("/models/Llama-2-7B-GPTQ")
  """
  @spec detect(String.t(), keyword() | map()) :: {:ok, Detected.t()} | {:error, Error.t()}
  def detect(model, options \\ []) do
    with {:ok, wire} <- Tools.about("detect", model, options),
         do: {:ok, Detected.from_wire(wire)}
  end

  @doc "Like `detect/2`, but raises `VLLM.Error`."
  @spec detect!(String.t(), keyword() | map()) :: Detected.t()
  def detect!(model, options \\ []), do: bang!(detect(model, options))

  @doc """
  Whether a model would run with these options, and what it would be: what `VLLM.llm/2` finds out
  before it starts an engine, as a report and not as an error.

      {:ok, report} = VLLM.Quantization.check("/models/Llama-3.1-8B-AWQ", tensor_parallel_size: 3)
      report.ok?
      #=> false
      for finding <- report.findings, do: IO.puts([finding.message, " ", finding.remedy])

  It is the same code that every start begins with: an engine whose check has an error does not
  start, and `VLLM.llm/2` ends with the reason, message and details of the first one. What is found
  is all that can be told without reading weights: whether the options are such that vLLM takes,
  the model is complete, its quantization is known and has a kernel on this device, its packages
  are installed, the weights fit into the memory. vLLM is imported for it, which takes some seconds,
  unless there is an error before.

  `{:error, error}` says that it could not be asked: no Python, or the `timeout`.

  It can be asked about another machine, too:

  #{Options.docs(Options.machine())}

  Then the devices here are not looked at. What depends on the device is judged by what vLLM says
  that it needs and by the sizes; what only the device itself can tell is a finding of the severity
  `:info` and the reason `:device`. It also has the most tokens/s that the bandwidth of the memory
  allows one request, where that is known: `details["tokens_per_second"]`.
  """
  @spec check(String.t(), keyword() | map()) :: {:ok, Report.t()} | {:error, Error.t()}
  def check(model, options \\ []) do
    with {:ok, wire} <- Tools.about("check", model, options, Options.machine()),
         do: {:ok, Report.from_wire(wire)}
  end

  @doc "Like `check/2`, but raises `VLLM.Error` where it could not be asked."
  @spec check!(String.t(), keyword() | map()) :: Report.t()
  def check!(model, options \\ []), do: bang!(check(model, options))

  @doc """
  The quantization methods of the installed vLLM and its plugins, with what this library knows of
  them and what runs on this device.

  It is vLLM that is asked, by having it make one layer in each format. Its import takes some
  seconds.

      {:ok, methods} = VLLM.Quantization.methods()
      for %{runs?: true} = method <- methods, do: method.name

  Options are `:timeout`, `:python` and `:env`.
  """
  @spec methods(keyword() | map()) :: {:ok, [Method.t()]} | {:error, Error.t()}
  def methods(options \\ []) do
    with {:ok, wire} <- Tools.general("methods", %{}, options),
         do: {:ok, Enum.map(wire, &Method.from_wire/1)}
  end

  @doc "Like `methods/1`, but raises `VLLM.Error`."
  @spec methods!(keyword() | map()) :: [Method.t()]
  def methods!(options \\ []), do: bang!(methods(options))

  @doc """
  How much memory an engine would take on each of its devices, whether it fits, how long a context and
  how many requests at a time do, and what would make it fit.

      {:ok, estimate} =
        VLLM.Quantization.estimate("TheBloke/Llama-2-70B-AWQ",
          devices: ["24GiB", "24GiB"], gpu_memory_utilization: 0.95)

      estimate.fits?
      #=> true
      estimate.kv_cache.tokens
      #=> 31824

  No weights are read: their sizes are in the headers of the files. A model fits where there is room
  for its weights, what vLLM needs beside them, and `:concurrency` requests of `max_model_len` tokens;
  vLLM starts where there is room for one. `guides/sizing.md` tells what each figure is from, and how
  sure it is.

  Of an engine's options those count that change any of it: `max_model_len`, `kv_cache_dtype`,
  `dtype`, `quantization`, `gpu_memory_utilization`, the parallel sizes, `max_num_batched_tokens`,
  `enable_lora` with `max_loras` and `max_lora_rank`, `cpu_offload_gb`, `speculative_config`, … Further
  options:

  #{Options.docs(Options.estimate())}

  Several devices are used all: by tensor parallelism, or by pipeline parallelism where they do not
  divide the model's heads. Of a single one there are as many as `tensor_parallel_size` and
  `pipeline_parallel_size` ask for.

  Errors are those of the model, as of `detect/2`; `:unsupported` where no headers can be read, as of
  files of before torch 1.6; `:invalid_option` for an option or a device that is not known.
  """
  @spec estimate(String.t(), keyword() | map()) :: {:ok, Estimate.t()} | {:error, Error.t()}
  def estimate(model, options \\ []) do
    with {:ok, wire} <- Tools.about("estimate", model, options, Options.estimate()),
         do: {:ok, Estimate.from_wire(wire)}
  end

  @doc "Like `estimate/2`, but raises `VLLM.Error`."
  @spec estimate!(String.t(), keyword() | map()) :: Estimate.t()
  def estimate!(model, options \\ []), do: bang!(estimate(model, options))

  @doc """
  Which formats of a model suit a purpose and a device: a ranked list with sizes, what is lost, speed,
  reasons, and how to have each.

      advice = VLLM.Quantization.recommend!("meta-llama/Llama-3.1-8B", for: :latency, device: "RTX 4090")
      hd(advice.choices).format
      #=> "awq (4 bits)"

  The rules are data, each with its source; `guides/choosing.md` explains them, and when not to follow
  them. What cannot run on the device, or does not fit, is in `:ruled_out` with the reason. Of an
  engine's options those count here that say how much memory it needs beside the weights
  (`max_model_len`, `kv_cache_dtype`, `tensor_parallel_size`, …).

  Options:

  #{Options.docs(Options.recommend())}

  Errors are those of the model, as of `detect/2`; `:unsupported_architecture` and others where it
  cannot run in any format; `:invalid_option` for a goal or a device that is not known.
  """
  @spec recommend(String.t(), keyword() | map()) :: {:ok, Advice.t()} | {:error, Error.t()}
  def recommend(model, options \\ []) do
    with {:ok, wire} <- Tools.about("recommend", model, options, Options.recommend()),
         do: {:ok, Advice.from_wire(wire)}
  end

  @doc "Like `recommend/2`, but raises `VLLM.Error`."
  @spec recommend!(String.t(), keyword() | map()) :: Advice.t()
  def recommend!(model, options \\ []), do: bang!(recommend(model, options))

  @doc """
  What models lost that were made of another: each is loaded, one after the other, and what it expects
  at each place of texts that it has not seen is compared with what the first of them does.

      {:ok, comparison} =
        VLLM.Quantization.compare(["/models/Llama-3.2-1B", "/models/Llama-3.2-1B-AWQ", "llama:Q4_K_M"])

      IO.puts(comparison)
      File.write!("quality.svg", VLLM.Quantization.Comparison.plot!(comparison))

  Told are KL divergence, perplexity, how often both hold the same token for the likeliest, sizes and
  tokens/s; and whether a quantization is worse than its format usually is, with what to try instead:
  see `VLLM.Quantization.Comparison.Row`, and `guides/quantizing.md` for what the figures mean. Models
  whose tokenizers cut the texts otherwise can be compared by `:bits_per_byte` alone, which is said
  in `:says`.

  Each model takes the start of an engine and some seconds to minutes more, and as much memory as an
  engine of it. Where nothing else is said it runs without compilation (`enforce_eager: true`) and with
  a context and a KV cache that are just large enough: its tokens/s are for a comparison of these
  models. Other options are those of an engine, and the same for all of them.

  Options:

  #{Options.docs(Options.compare())}

  `{:error, error}` says that the options are wrong, that the reference could not be measured, or no
  other model. One that could not be measured while others could has its error in its row.
  """
  @spec compare([String.t(), ...], keyword() | map()) ::
          {:ok, Comparison.t()} | {:error, Error.t()}
  def compare(models, options \\ []), do: Comparing.compare(models, options)

  @doc "Like `compare/2`, but raises `VLLM.Error`."
  @spec compare!([String.t(), ...], keyword() | map()) :: Comparison.t()
  def compare!(models, options \\ []), do: bang!(compare(models, options))
end
