defmodule VLLM.Bench.Figures do
  alias VLLM.Bench.{Load, Statistics}
  alias VLLM.Fields

  @fields [
    completed: "how many requests had an answer",
    failed: "how many ended with an error",
    errors: "which errors these were, three of them at most, as texts",
    duration: "the seconds that all took",
    total_input_tokens: "tokens of the prompts of those that had an answer",
    total_output_tokens: "tokens of their answers",
    request_throughput: "requests with an answer per second",
    output_throughput: "tokens of answers per second",
    total_token_throughput: "tokens of prompts and answers per second",
    mean_ttft_ms: "milliseconds until the first token (TTFT), as the mean over the requests",
    median_ttft_ms: "their median",
    p99_ttft_ms: "what one request of a hundred exceeds",
    mean_tpot_ms:
      "milliseconds per token after the first (TPOT: the rest of the time over the rest of the tokens of " <>
        "each request that has two), as the mean over the requests",
    median_tpot_ms: "their median",
    p99_tpot_ms: "what one request of a hundred exceeds",
    mean_itl_ms:
      "milliseconds from one delta of a stream to the next (ITL), as the mean over all of all requests. A " <>
        "delta may have several tokens",
    median_itl_ms: "their median",
    p99_itl_ms: "what one of a hundred exceeds",
    mean_e2el_ms: "milliseconds from a request to its last token (E2EL), as the mean",
    median_e2el_ms: "their median",
    p99_e2el_ms: "what one request of a hundred exceeds",
    cpu_ms_per_1k_tokens:
      "CPU milliseconds that the engine's processes took for 1,000 tokens of answers; nil where nothing " <>
        "is known of them",
    beam_cpu_ms_per_1k_tokens: "the same of this BEAM, with all that ran in it"
  ]

  @moduledoc """
  What a round of a benchmark has measured, by the names and definitions of `vllm bench serve`.

  #{Fields.docs(@fields)}
  """

  @names Keyword.keys(@fields)
  defstruct @names

  @type t :: %__MODULE__{}

  @latencies [:ttft, :tpot, :itl, :e2el]

  @doc false
  @spec latencies() :: [atom()]
  def latencies, do: @latencies

  @doc false
  # The name of a latency's figure: `name(:mean, :ttft)` is `:mean_ttft_ms`.
  @spec name(:mean | :median | :p99, atom()) :: atom()
  for latency <- @latencies, kind <- [:mean, :median, :p99] do
    def name(unquote(kind), unquote(latency)), do: unquote(:"#{kind}_#{latency}_ms")
  end

  @doc false
  @spec new([Load.result()], float(), float() | nil, float()) :: t()
  def new(results, seconds, cpu, beam_cpu) do
    noted = for {:ok, noted} <- results, do: noted
    errors = for {:error, error} <- results, uniq: true, do: "#{error.reason}: #{error.message}"
    input = noted |> Enum.map(& &1.input_len) |> Enum.sum()
    output = noted |> Enum.map(& &1.output_len) |> Enum.sum()

    struct!(
      %__MODULE__{
        completed: length(noted),
        failed: length(results) - length(noted),
        errors: Enum.take(errors, 3),
        duration: seconds,
        total_input_tokens: input,
        total_output_tokens: output,
        request_throughput: length(noted) / seconds,
        output_throughput: output / seconds,
        total_token_throughput: (input + output) / seconds,
        cpu_ms_per_1k_tokens: per_1k(cpu, output),
        beam_cpu_ms_per_1k_tokens: per_1k(beam_cpu, output)
      },
      Enum.flat_map(@latencies, &spread(&1, noted))
    )
  end

  defp per_1k(nil, _tokens), do: nil
  defp per_1k(_seconds, 0), do: nil
  defp per_1k(seconds, tokens), do: 1.0e6 * seconds / tokens

  defp spread(latency, noted) do
    times = noted |> times(latency) |> Enum.map(&(1000 * &1))

    [
      {name(:mean, latency), Statistics.mean(times)},
      {name(:median, latency), Statistics.median(times)},
      {name(:p99, latency), Statistics.percentile(times, 99)}
    ]
  end

  defp times(noted, :ttft), do: Enum.map(noted, & &1.ttft)
  defp times(noted, :itl), do: Enum.flat_map(noted, & &1.itls)
  defp times(noted, :e2el), do: Enum.map(noted, & &1.latency)

  defp times(noted, :tpot) do
    for %{output_len: tokens} = one when tokens > 1 <- noted,
        do: (one.latency - one.ttft) / (tokens - 1)
  end

  @doc false
  # The medians of rounds; counts are those of all of them together.
  @spec together([t(), ...]) :: t()
  def together(rounds) do
    figures =
      for name <- @names, name != :errors, into: %{} do
        values = for round <- rounds, value = Map.fetch!(round, name), do: value
        {name, together(name, values)}
      end

    errors = rounds |> Enum.flat_map(& &1.errors) |> Enum.uniq() |> Enum.take(3)
    struct!(%__MODULE__{errors: errors}, figures)
  end

  defp together(name, values) when name in [:completed, :failed], do: Enum.sum(values)

  defp together(name, values) when name in [:total_input_tokens, :total_output_tokens],
    do: Enum.sum(values)

  defp together(_name, values), do: Statistics.median(values)
end
