defmodule Mix.Tasks.Vllm.Check do
  @shortdoc "Says whether a model would run, and what is in its way"

  @moduledoc """
  Says whether a model would run, and what is in its way, before anything is loaded.

      mix vllm.check MODEL [OPTIONS] [--json]

      mix vllm.check /models/Llama-3.1-8B-AWQ --tensor-parallel-size 2 --max-model-len 8192

  Prints what the model would be, and a line for each finding with what to do about it below. Ends
  with status 1 where an error is among them, that is where `VLLM.llm/2` would refuse to start; and
  where the question could not be answered. `VLLM.Quantization.check/2` answers the same in Elixir.

  ## Options

    * `--device` - the device, when it is not this machine's: `"H100"`, `"2x A10G"`, `"cpu 64GiB"`
    * `--json` - prints all of the answer as JSON and nothing else

  Options of an engine are taken by their names, with `-` for `_`.
  """

  use Mix.Task

  alias Mix.Vllm.{Answer, Arguments, Table}
  alias VLLM.{Bytes, Quantization}
  alias VLLM.Quantization.Report

  @requirements ["app.config"]

  @impl Mix.Task
  def run(argv) do
    {model, options, flags} = Arguments.parse!(argv, "vllm.check", ["json"])
    flags |> Answer.of_vllm!(fn -> Quantization.check(model, options) end) |> report(flags)
  end

  @doc false
  @spec report(Report.t(), [String.t()]) :: :ok
  def report(report, flags) do
    Answer.print(report, flags, &print/1)
    unless report.ok?, do: exit({:shutdown, 1})
    :ok
  end

  # What a check finds out of a model, in the order of what people ask first.
  @facts [
    architecture: "architecture",
    family: "family",
    capabilities: "capabilities",
    method: "quantization",
    kernel: "kernel",
    dtype: "dtype",
    kv_cache_dtype: "KV cache",
    max_model_len: "context",
    loaded_bytes: "weights",
    tensor_parallel_size: "tensor parallel",
    pipeline_parallel_size: "pipeline parallel",
    runner: "runner",
    device: "device",
    vllm_version: "vLLM"
  ]

  defp print(report) do
    Mix.shell().info([:bright, report.model, :reset])
    known = for {name, title} <- @facts, value = shown(name, report), do: [title, value]
    widest = known |> Enum.map(fn [title, _] -> String.length(title) end) |> Enum.max(fn -> 0 end)

    for [title, value] <- known,
        do: Mix.shell().info("  #{String.pad_trailing(title, widest)}  #{value}")

    Enum.each(report.findings, &finding/1)
    Mix.shell().info(["\n" | verdict(report)])
  end

  defp shown(:method, %{method: nil, architecture: nil}), do: nil
  defp shown(:method, report), do: report.method || "none"

  defp shown(name, report) do
    case {name, Map.fetch!(report, name)} do
      {_, none} when none in [nil, []] -> nil
      {:capabilities, names} -> Enum.join(names, ", ")
      {:loaded_bytes, 0} -> nil
      {:loaded_bytes, bytes} -> "#{Bytes.memory(bytes)} at least"
      {:max_model_len, tokens} -> "#{Table.whole(tokens)} tokens"
      {name, 1} when name in [:tensor_parallel_size, :pipeline_parallel_size] -> nil
      {_, value} -> to_string(value)
    end
  end

  @marks %{error: {:red, "error"}, warning: {:yellow, "warning"}, info: {:cyan, "info"}}

  defp finding(finding) do
    {colour, mark} = @marks[finding.severity]
    Mix.shell().info(["\n", colour, mark, :reset, " (#{finding.reason}) ", finding.message])
    if finding.remedy != "", do: Mix.shell().info("  -> " <> finding.remedy)
  end

  defp verdict(%{ok?: true}), do: [:green, "It can run.", :reset]
  defp verdict(%{ok?: false}), do: [:red, "It cannot run like this.", :reset]
end
