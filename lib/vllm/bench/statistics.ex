defmodule VLLM.Bench.Statistics do
  @moduledoc false
  # What is made of measured numbers, and random times from a seed.

  @resamples 2000

  @doc """
  The mean; nil of no numbers.

      iex> VLLM.Bench.Statistics.mean([1, 2, 6])
      3.0
  """
  @spec mean([number()]) :: float() | nil
  def mean([]), do: nil
  def mean(numbers), do: Enum.sum(numbers) / length(numbers)

  @doc """
  A percentile, between two numbers in proportion, as NumPy's default and with it vLLM have it; nil
  of no numbers.

      iex> VLLM.Bench.Statistics.percentile([30, 10, 20, 40], 50)
      25.0
  """
  @spec percentile([number()], number()) :: float() | nil
  def percentile([], _percent), do: nil
  def percentile(numbers, percent), do: numbers |> Enum.sort() |> List.to_tuple() |> at(percent)

  defp at(sorted, percent) do
    place = percent / 100 * (tuple_size(sorted) - 1)
    below = elem(sorted, floor(place))
    below + (place - floor(place)) * (elem(sorted, ceil(place)) - below) / 1
  end

  @doc """
  The median; nil of no numbers.

      iex> VLLM.Bench.Statistics.median([3, 1, 2])
      2.0
  """
  @spec median([number()]) :: float() | nil
  def median(numbers), do: percentile(numbers, 50)

  @doc """
  The median of numbers and the interval that holds it at 95 %, by bootstrap: what the medians of
  numbers are that were drawn of these again and again. The same numbers have the same interval.
  """
  @spec interval([number(), ...]) :: {median :: float(), low :: float(), high :: float()}
  def interval(numbers) do
    drawn = List.to_tuple(numbers)
    count = tuple_size(drawn)

    {medians, _random} =
      Enum.map_reduce(1..@resamples, random(0), fn _, random ->
        {sample, random} =
          Enum.map_reduce(1..count, random, fn _, random ->
            {place, random} = :rand.uniform_s(count, random)
            {elem(drawn, place - 1), random}
          end)

        {median(sample), random}
      end)

    {median(numbers), percentile(medians, 2.5), percentile(medians, 97.5)}
  end

  @doc "Random numbers from a seed, for `:rand`'s functions that end in `_s`."
  @spec random(non_neg_integer()) :: :rand.state()
  def random(seed), do: :rand.seed_s(:exsss, seed)

  @doc """
  When each of `count` requests comes, in seconds: at `rate` requests a second on average, and the last
  one at `count / rate`. Their distances are of a gamma distribution of the shape `burstiness`, which for
  1 is a Poisson process, and are scaled to that end, as `vllm bench serve` does.
  """
  @spec arrivals(pos_integer(), number(), number(), non_neg_integer()) :: [float(), ...]
  def arrivals(count, rate, burstiness, seed) do
    {gaps, _random} =
      Enum.map_reduce(1..count, random(seed), fn _, random -> gamma(burstiness / 1, random) end)

    last = count / rate

    case Enum.sum(gaps) do
      # One burst, whose distances are too small for a number.
      sum when sum == 0 -> List.duplicate(last, count)
      sum -> Enum.scan(gaps, &(&1 + &2)) |> Enum.map(&(&1 / sum * last))
    end
  end

  # By Marsaglia and Tsang; a shape below 1 is made of the next larger one.
  defp gamma(shape, random) when shape < 1 do
    {gap, random} = gamma(shape + 1, random)
    {uniform, random} = :rand.uniform_real_s(random)
    {gap * :math.pow(uniform, 1 / shape), random}
  end

  defp gamma(shape, random) do
    d = shape - 1 / 3
    {normal, random} = :rand.normal_s(random)
    {uniform, random} = :rand.uniform_real_s(random)
    v = 1 + normal / :math.sqrt(9 * d)

    if v > 0 and
         :math.log(uniform) <
           normal * normal / 2 + d - d * v * v * v + 3 * d * :math.log(v),
       do: {d * v * v * v, random},
       else: gamma(shape, random)
  end
end
