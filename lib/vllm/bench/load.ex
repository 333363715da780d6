defmodule VLLM.Bench.Load do
  @moduledoc false
  # Asks an engine a round of requests and notes when what of each came.

  alias VLLM.Bench.Dataset
  alias VLLM.Error

  # In milliseconds.
  @day 86_400_000

  @typedoc """
  What is noted of a request, in seconds: how long until its first token, the times from one delta
  to the next, and how long until the last one; and how many tokens it had.
  """
  @type noted :: %{
          ttft: float(),
          itls: [float()],
          latency: float(),
          input_len: pos_integer(),
          output_len: pos_integer()
        }

  @type result :: {:ok, noted()} | {:error, Error.t()}

  @doc """
  Asks all of the requests, at most `concurrency` at a time (or nil), each not before its time of
  `arrivals`, in seconds from the start. Returns what became of each, and the seconds that all took.

  A request begins for its own figures when it is sent, and not before: what waits because of
  `concurrency` has not begun. It is so in `vllm bench serve`.
  """
  @spec run(VLLM.engine(), [Dataset.t(), ...], pos_integer() | nil, [float()] | nil) ::
          {[result()], float()}
  def run(engine, requests, concurrency, arrivals) do
    # In a table, so that the processes have no copy of them all.
    table = :ets.new(__MODULE__, [:public, read_concurrency: true])
    count = length(requests)

    requests
    |> Enum.zip(arrivals || List.duplicate(nil, count))
    |> Enum.with_index(1)
    |> Enum.each(fn {{request, arrival}, index} ->
      :ets.insert(table, {index, request, arrival})
    end)

    next = :atomics.new(1, signed: false)
    start = System.monotonic_time()
    workers = min(concurrency || count, count)

    results =
      1..workers
      |> Enum.map(fn _ -> Task.async(fn -> work(engine, table, next, count, start, []) end) end)
      |> Task.await_many(:infinity)

    seconds = since(start)
    :ets.delete(table)
    {Enum.concat(results), seconds}
  end

  # Each process takes the next request when it has done one.
  defp work(engine, table, next, count, start, results) do
    case :atomics.add_get(next, 1, 1) do
      index when index > count ->
        results

      index ->
        [{_, request, arrival}] = :ets.lookup(table, index)
        wait_until(arrival, start)
        work(engine, table, next, count, start, [ask(engine, request) | results])
    end
  end

  defp wait_until(nil, _start), do: :ok

  defp wait_until(arrival, start) do
    case round(1000 * (arrival - since(start))) do
      # In pieces, since no process sleeps longer than some weeks.
      ms when ms > 0 ->
        ms |> min(@day) |> Process.sleep()
        wait_until(arrival, start)

      _come ->
        :ok
    end
  end

  @doc "Asks one request."
  @spec ask(VLLM.engine(), Dataset.t()) :: result()
  def ask(engine, request) do
    start = System.monotonic_time()
    none = %{ttft: nil, itls: [], latency: 0.0, input_len: request.input_len, output_len: 0}

    engine
    |> stream(request)
    |> Enum.reduce(none, fn
      {:ok, %{token_ids: []}}, noted -> noted
      {:ok, delta}, noted -> note(noted, since(start), length(delta.token_ids))
      {:error, error}, _noted -> error
    end)
    |> case do
      %Error{} = error -> {:error, error}
      %{ttft: nil} -> {:error, Error.new(:internal, "A request ended without a token.")}
      noted -> {:ok, noted}
    end
  end

  defp stream(engine, %{input: {:prompt, prompt}, options: options}),
    do: VLLM.stream(engine, prompt, options)

  defp stream(engine, %{input: {:conversation, messages}, options: options}),
    do: VLLM.chat_stream(engine, messages, options)

  defp note(%{ttft: nil} = noted, time, tokens),
    do: %{noted | ttft: time, latency: time, output_len: tokens}

  defp note(noted, time, tokens) do
    %{
      noted
      | itls: [time - noted.latency | noted.itls],
        latency: time,
        output_len: noted.output_len + tokens
    }
  end

  defp since(start),
    do: System.convert_time_unit(System.monotonic_time() - start, :native, :nanosecond) / 1.0e9
end
