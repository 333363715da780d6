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
  def deltas(prepare), do: Inbox.stream(fn inbox -> &begin(prepare, inbox, &1, &2) end)

  # What `Stream.resource/3` and `Stream.map/2` do, which cost as much as all else does that a delta
  # goes through here.
  defp begin(prepare, inbox, {:cont, acc}, fun) do
    with {:ok, {table, method, params, call}} <- prepare.(),
         {:ok, reader} <- Reader.open(table, method, params, call, inbox) do
      read(reader, {:cont, acc}, fun)
    else
      {:error, error} -> ended(fun.({:error, error}, acc))
    end
  end

  defp begin(prepare, inbox, {:suspend, acc}, fun),
    do: {:suspended, acc, &begin(prepare, inbox, &1, fun)}

  defp begin(_prepare, _inbox, {:halt, acc}, _fun), do: {:halted, acc}

  defp read(reader, {:cont, acc}, fun) do
    case next(reader) do
      {{:delta, delta}, reader} -> read(reader, give(reader, {:ok, delta}, acc, fun), fun)
      {{:done, _output}, _reader} -> {:done, acc}
      {{:error, error}, _reader} -> ended(fun.({:error, error}, acc))
    end
  end

  defp read(reader, {:suspend, acc}, fun), do: {:suspended, acc, &read(reader, &1, fun)}

  defp read(reader, {:halt, acc}, _fun) do
    Reader.close(reader)
    {:halted, acc}
  end

  # Whatever raises, here or in whom it is for, closes the stream.
  defp next(reader) do
    Reader.next(reader)
  catch
    kind, reason -> close(reader, kind, reason, __STACKTRACE__)
  end

  defp give(reader, element, acc, fun) do
    fun.(element, acc)
  catch
    kind, reason -> close(reader, kind, reason, __STACKTRACE__)
  end

  defp close(reader, kind, reason, stacktrace) do
    Reader.close(reader)
    :erlang.raise(kind, reason, stacktrace)
  end

  defp ended({:cont, acc}), do: {:done, acc}
  defp ended({:suspend, acc}), do: {:suspended, acc, &ended/1}
  defp ended({:halt, acc}), do: {:halted, acc}

  @doc "The same of other elements, without what `Stream.map/2` costs."
  @spec map(Enumerable.t(), (term() -> term())) :: Enumerable.t()
  def map(deltas, function) do
    fn acc, fun -> Enumerable.reduce(deltas, acc, &fun.(function.(&1), &2)) end
  end

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
