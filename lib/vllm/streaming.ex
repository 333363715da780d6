defmodule VLLM.Streaming do
  @moduledoc false
  # Streams of deltas as lazy enumerables, and many prompts as a pipeline.

  alias VLLM.Bridge.Inbox
  alias VLLM.Engine.{Call, Dispatch, InFlight, Table}
  alias VLLM.Error
  alias VLLM.Streaming.Reader

  @doc """
  A lazy enumerable of `{:ok, %VLLM.Delta{}}`, and at last `{:error, error}` if
  it ends with one. `prepare` gives table, method, params and call when it is
  enumerated. Whoever leaves early closes the stream.
  """
  @spec deltas((() -> {:ok, {Table.t(), String.t(), map(), Call.t()}} | {:error, Error.t()})) ::
          Enumerable.t()
  def deltas(prepare) do
    Inbox.stream(fn inbox ->
      Stream.resource(
        fn ->
          with {:ok, {table, method, params, call}} <- prepare.(),
               do: Reader.open(table, method, params, call, inbox)
        end,
        &next/1,
        fn
          {:ok, reader} -> Reader.close(reader)
          _ended -> :ok
        end
      )
    end)
  end

  defp next({:ok, reader}) do
    case Reader.next(reader) do
      {{:delta, delta}, reader} -> {[{:ok, delta}], {:ok, reader}}
      {{:done, _output}, _reader} -> {:halt, :ended}
      {{:error, error}, _reader} -> {[{:error, error}], :ended}
    end
  end

  defp next({:error, error}), do: {[{:error, error}], :ended}
  defp next(:ended), do: {:halt, :ended}

  @doc """
  A lazy enumerable of `{index, {:ok, result} | {:error, error}}` for `prompts`,
  which may be endless: no more of them are taken than are under way. `request`
  makes the params of one prompt, `result` what becomes of its answer; the times
  of `call` are each prompt's own.
  """
  @spec pipeline(
          Table.t(),
          Enumerable.t(),
          (term() -> {:ok, map()} | {:error, Error.t()}),
          (map() -> term()),
          Call.t()
        ) ::
          Enumerable.t()
  def pipeline(table, prompts, request, result, call) do
    job = %{request: request, result: result, call: call}

    input = &Enumerable.reduce(prompts, &1, fn prompt, _ -> {:suspend, {:prompt, prompt}} end)

    Inbox.stream(fn inbox ->
      Stream.resource(
        # The params and the index of the prompt that waits to be sent, and the index of the next.
        fn ->
          in_flight = InFlight.new(table, "generate", inbox)
          %{input: input, waiting: nil, next: 0, in_flight: in_flight}
        end,
        &step(&1, job),
        fn state ->
          InFlight.cancel(state.in_flight)
          if state.input, do: state.input.({:halt, :none})
        end
      )
    end)
  end

  # Each step sends one prompt while there is room, and otherwise waits for one answer.
  defp step(%{waiting: nil, input: nil} = state, job) do
    if InFlight.count(state.in_flight) == 0, do: {:halt, state}, else: collect(state, job)
  end

  defp step(%{waiting: nil, input: input} = state, job) do
    case input.({:cont, :none}) do
      {:suspended, {:prompt, prompt}, rest} -> take(prompt, %{state | input: rest}, job)
      # A source may end with its last element, or after it.
      {_ended, {:prompt, prompt}} -> take(prompt, %{state | input: nil}, job)
      {_ended, :none} -> {[], %{state | input: nil}}
    end
  end

  defp step(%{waiting: {params, index}, in_flight: in_flight} = state, job) do
    none? = InFlight.count(in_flight) == 0
    call = Call.begin(job.call)

    case InFlight.submit(in_flight, index, params, call) do
      {:ok, in_flight} ->
        {[], %{state | waiting: nil, in_flight: in_flight}}

      :none_ready when none? ->
        case Dispatch.await_ready(in_flight.table, call) do
          :ok -> {[], state}
          {:error, error} -> {[{index, {:error, error}}], %{state | waiting: nil}}
        end

      {:error, %Error{} = error} when error.reason != :overloaded or none? ->
        {[{index, {:error, error}}], %{state | waiting: nil}}

      _full ->
        collect(state, job)
    end
  end

  defp take(prompt, %{next: index} = state, job) do
    state = %{state | next: index + 1}

    case job.request.(prompt) do
      {:ok, params} -> {[], %{state | waiting: {params, index}}}
      {:error, error} -> {[{index, {:error, error}}], state}
    end
  end

  defp collect(state, job) do
    {index, answer, in_flight} = InFlight.next(state.in_flight)
    answer = with {:ok, value} <- answer, do: {:ok, job.result.(value)}
    {[{index, answer}], %{state | in_flight: in_flight}}
  end
end
