defmodule VLLM.Web.Figures do
  @moduledoc false
  # What the admin API tells of how busy an engine is, made of vLLM's metrics at
  # two moments: pure.

  @gauges %{
    "vllm:num_requests_running" => :running,
    "vllm:num_requests_waiting" => :waiting,
    "vllm:kv_cache_usage_perc" => :kv_cache_usage
  }
  @counters %{
    "vllm:generation_tokens_total" => :tokens,
    "vllm:time_to_first_token_seconds_sum" => :ttft,
    "vllm:time_to_first_token_seconds_count" => :ttft_count,
    "vllm:inter_token_latency_seconds_sum" => :itl,
    "vllm:inter_token_latency_seconds_count" => :itl_count,
    "vllm:prefix_cache_queries_total" => :queries,
    "vllm:prefix_cache_hits_total" => :hits
  }
  @names Map.merge(@gauges, @counters)

  @typedoc "The sums of what is told, over all replicas that answered; nothing of what none has told."
  @type sums :: %{atom() => number()}

  @doc "The sums of the metrics that replicas have answered with."
  @spec sums([[map()] | nil]) :: sums()
  def sums(answers) do
    samples =
      for families <- answers,
          family <- families || [],
          [name, _labels, value] <- family["samples"],
          is_number(value),
          sum = @names[name],
          do: {sum, value}

    sums =
      Enum.reduce(samples, %{}, fn {name, value}, sums ->
        Map.update(sums, name, value, &(&1 + value))
      end)

    shares = for {:kv_cache_usage, share} <- samples, do: share

    # A share of each replica's, which are averaged.
    if shares == [], do: sums, else: %{sums | kv_cache_usage: Enum.sum(shares) / length(shares)}
  end

  @doc """
  The figures of these sums, and of those that were `seconds` before them, if any.

      iex> before = %{tokens: 100, ttft: 1.0, ttft_count: 4}
      iex> figures = VLLM.Web.Figures.new(%{running: 2.0, tokens: 150, ttft: 1.5, ttft_count: 5}, before, 2.0)
      iex> {figures.running, figures.tokens_per_second, figures.ttft_seconds, figures.itl_seconds}
      {2, 25.0, 0.5, nil}
  """
  @spec new(sums(), sums() | nil, float()) :: %{atom() => number() | nil}
  def new(sums, before, seconds) do
    %{
      running: whole(sums[:running]),
      waiting: whole(sums[:waiting]),
      kv_cache_usage: sums[:kv_cache_usage],
      prefix_cache_hit_rate: share(sums[:hits], sums[:queries]),
      tokens_per_second: share(more(sums, before, :tokens), seconds),
      ttft_seconds: share(more(sums, before, :ttft), more(sums, before, :ttft_count)),
      itl_seconds: share(more(sums, before, :itl), more(sums, before, :itl_count))
    }
  end

  defp whole(nil), do: nil
  defp whole(number), do: round(number)

  # A replica that began anew counts from 0: then nothing is known until the next time.
  defp more(sums, before, name) do
    with %{^name => earlier} <- before || %{}, %{^name => now} when now >= earlier <- sums do
      now - earlier
    else
      _unknown -> nil
    end
  end

  defp share(part, whole) when is_number(part) and is_number(whole) and whole > 0,
    do: part / whole

  defp share(_part, _whole), do: nil
end
