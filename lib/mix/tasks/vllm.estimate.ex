defmodule Mix.Tasks.Vllm.Estimate do
  @shortdoc "Says how much memory a model takes, and whether it fits"

  @moduledoc """
  Says how much memory a model takes on each device, and whether it fits.

      mix vllm.estimate MODEL [OPTIONS] [--json]

      mix vllm.estimate TheBloke/Llama-2-70B-AWQ --devices 24GiB,24GiB --gpu-memory-utilization 0.95
      mix vllm.estimate meta-llama/Llama-3.1-8B --device "RTX 4090" --max-model-len 8192 --concurrency 4

  Prints what each device holds, how long a context and how many requests at a time fit, what would
  make the model fit where it does not, and what a plain model would take in other formats.
  `VLLM.Quantization.estimate/2` answers the same in Elixir, and `guides/sizing.md` says how sure it is.

  ## Options

    * `--device` - the device, when it is not this machine's: `"H100"`, `"2x A10G"`, `"24GiB"`,
      `"cpu 64GiB"`
    * `--devices` - several of them, with commas between them
    * `--concurrency` - how many requests of `max_model_len` tokens are to fit at a time; default 1
    * `--json` - prints all of the answer as JSON and nothing else

  Options of an engine are taken by their names, with `-` for `_`.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments, Table}
  alias VLLM.{Bytes, Quantization}
  alias VLLM.Quantization.Estimate

  @requirements ["app.config"]

  @impl Mix.Task
  def run(argv) do
    {model, options, flags} = Arguments.parse!(argv, "vllm.estimate", ["json"])
    model |> Quantization.estimate(options) |> Answer.ok!() |> report(flags)
  end

  @doc false
  @spec report(Estimate.t(), [String.t()]) :: :ok
  def report(estimate, flags), do: Answer.print(estimate, flags, &print/1)

  defp print(estimate) do
    Mix.shell().info([:bright, "#{estimate.model}", :reset, ", #{estimate.method || "plain"}\n"])
    Table.print(columns(estimate), Enum.map(estimate.devices, &device(&1, estimate)))
    Mix.shell().info("")
    estimate |> sentences() |> Enum.each(&Mix.shell().info/1)
    Mix.shell().info(["\n" | verdict(estimate)])
    Enum.each(estimate.remedies, &Mix.shell().info("  -> " <> &1.text))
    formats(estimate.formats)
  end

  # What most engines do not have is left out where no device has it.
  defp shown(estimate) do
    Enum.reject([:adapters, :draft], fn name -> Enum.all?(estimate.devices, &(&1[name] == 0)) end)
  end

  defp columns(estimate) do
    names = Enum.map(shown(estimate), &Atom.to_string/1)

    ["device" | right(["memory", "for vLLM", "weights"] ++ names)] ++
      right(["activations", "framework", "KV cache", "left"])
  end

  defp right(titles), do: Enum.map(titles, &{:right, &1})

  defp device(device, estimate) do
    names =
      [:memory, :budget, :weights] ++ shown(estimate) ++ [:activations, :framework, :kv_cache]

    left = signed(device.left)

    [device.name | Enum.map(names, &Bytes.memory(device[&1]))] ++
      [if(device.fits?, do: left, else: {:red, left})]
  end

  defp signed(bytes) when bytes < 0, do: "-" <> Bytes.memory(-bytes)
  defp signed(bytes), do: Bytes.memory(bytes)

  defp sentences(%{kv_cache: cache, weights: weights} = estimate) do
    [
      "Weights:  #{Bytes.memory(weights.memory)} in memory, #{Bytes.file(weights.disk)} on the disk#{peak(weights)}.",
      "KV cache: #{Bytes.memory(cache.bytes_per_token)} for each token#{approximate(cache)}, counted for " <>
        "#{requests(estimate.concurrency)} of #{Table.whole(estimate.max_model_len)} tokens.",
      "Context:  #{Table.whole(estimate.longest_context)} tokens at most#{concurrency(estimate)}."
    ] ++ speed(estimate.tokens_per_second)
  end

  defp peak(%{peak: peak, memory: memory}) when peak > memory,
    do: ", #{Bytes.memory(peak)} while they load"

  defp peak(_weights), do: ""

  defp approximate(%{approximate?: true}), do: ", about"
  defp approximate(_cache), do: ""

  defp requests(1), do: "one request"
  defp requests(count), do: "#{count} requests"

  defp concurrency(%{max_concurrency: nil}), do: ""

  defp concurrency(%{max_concurrency: count, max_model_len: length}) do
    verb = if count == 1, do: "fits", else: "fit"
    "; #{requests(count)} of #{Table.whole(length)} #{verb} at a time"
  end

  defp speed(nil), do: []

  defp speed(tokens) do
    [
      "Speed:    #{Table.decimal(tokens, 1)} tokens/s of one request is the limit of the memory's bandwidth; expect less."
    ]
  end

  defp verdict(%{fits?: true}), do: [:green, "It fits.", :reset]
  defp verdict(%{remedies: []}), do: [:red, "It does not fit.", :reset]

  defp verdict(_estimate),
    do: [:red, "It does not fit.", :reset, " Each of these alone would make it fit:"]

  defp formats([]), do: :ok

  defp formats(formats) do
    Mix.shell().info("\nIn other formats, with the same context:")

    Table.print(
      ["format", {:right, "disk"}, {:right, "memory"}, "fits"],
      Enum.map(formats, &format/1)
    )
  end

  defp format(one) do
    fits = if one.fits?, do: {:green, "yes"}, else: {:red, "no"}
    [name(one), Bytes.file(one.disk), Bytes.memory(one.memory), fits]
  end

  defp name(%{method: "gguf", name: name}), do: "gguf (#{name})"
  defp name(%{name: name}), do: name
end
