defmodule VLLM.Streaming do
  @moduledoc false
  # Streams of deltas as lazy enumerables, and many prompts as a pipeline.

  alias VLLM.Bridge.Connection
  alias VLLM.Engine.{Control, Router, Table}
  alias VLLM.Error
  alias VLLM.Streaming.Reader

  @doc """
  A lazy enumerable of `{:ok, %VLLM.Delta{}}`, and at last `{:error, error}` if
  it ends with one. `prepare` gives table, method, params and deadline when it
  is enumerated. Whoever leaves early closes the stream.
  """
  @spec deltas(
          (() -> {:ok, {Table.t(), String.t(), map(), Connection.deadline()}}
                 | {:error, Error.t()})
        ) ::
          Enumerable.t()
  def deltas(prepare) do
    Stream.resource(
      fn ->
        with {:ok, {table, method, params, deadline}} <- prepare.(),
             do: Reader.open(table, method, params, deadline)
      end,
      &next/1,
      fn
        {:ok, reader} -> Reader.close(reader)
        _ended -> :ok
      end
    )
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
  makes the params of one prompt, `result` what becomes of its answer.
  """
  @spec pipeline(
          Table.t(),
          Enumerable.t(),
          (term() -> {:ok, map()} | {:error, Error.t()}),
          (map() -> term()),
          timeout()
        ) ::
          Enumerable.t()
  def pipeline(table, prompts, request, result, timeout) do
    job = %{table: table, request: request, result: result, timeout: timeout}

    Stream.resource(
      fn ->
        %{
          input:
            &Enumerable.reduce(prompts, &1, fn prompt, _ -> {:suspend, {:prompt, prompt}} end),
          # The params and the index of the prompt that is to be sent next.
          waiting: nil,
          next: 0,
          # Of each request, by its ref: it, its index and its deadline.
          under_way: %{}
        }
      end,
      &step(&1, job),
      fn state ->
        for {_ref, {request, _, _}} <- state.under_way, do: Connection.cancel(request)
        if state.input, do: state.input.({:halt, :none})
      end
    )
  end

  # What fits is sent, a prompt a step; then one answer is waited for.
  defp step(%{waiting: nil, input: nil, under_way: none} = state, _job) when none == %{} do
    {:halt, state}
  end

  defp step(%{waiting: nil, input: input} = state, job) when input != nil do
    case input.({:cont, :none}) do
      {:suspended, {:prompt, prompt}, rest} -> take(prompt, %{state | input: rest}, job)
      # A source may end with its last element, or after it.
      {_ended, {:prompt, prompt}} -> take(prompt, %{state | input: nil}, job)
      {_ended, :none} -> {[], %{state | input: nil}}
    end
  end

  defp step(%{waiting: {params, index}, under_way: under_way} = state, job) do
    case Router.submit(job.table, "generate", params, map_size(under_way)) do
      {:ok, sent} ->
        entry = {sent, index, Connection.deadline(job.timeout)}
        {[], %{state | waiting: nil, under_way: Map.put(under_way, sent.ref, entry)}}

      :none_ready when under_way == %{} ->
        case Control.await(job.table, :any, Connection.deadline(job.timeout)) do
          :ok -> {[], state}
          {:error, error} -> {[{index, {:error, error}}], %{state | waiting: nil}}
        end

      {:error, %Error{} = error} when error.reason != :overloaded or under_way == %{} ->
        {[{index, {:error, error}}], %{state | waiting: nil}}

      _full ->
        collect(state, job)
    end
  end

  defp step(state, job), do: collect(state, job)

  defp take(prompt, %{next: index} = state, job) do
    state = %{state | next: index + 1}

    case job.request.(prompt) do
      {:ok, params} -> {[], %{state | waiting: {params, index}}}
      {:error, error} -> {[{index, {:error, error}}], state}
    end
  end

  defp collect(%{under_way: under_way} = state, job) do
    {first, {request, index, deadline}} = Enum.min_by(under_way, fn {_, {_, _, at}} -> at end)

    receive do
      {ref, answer} when is_map_key(under_way, ref) ->
        {{request, index, _}, under_way} = Map.pop!(under_way, ref)

        answer =
          with {:ok, value} <- Connection.answer(request, answer), do: {:ok, job.result.(value)}

        {[{index, answer}], %{state | under_way: under_way}}

      {:DOWN, ref, :process, _pid, reason} when is_map_key(under_way, ref) ->
        {{request, index, _}, under_way} = Map.pop!(under_way, ref)
        {[{index, {:error, Connection.down(request, reason)}}], %{state | under_way: under_way}}
    after
      Connection.remaining(deadline) ->
        error = Connection.timeout()
        Connection.cancel(request, error)
        under_way = Map.delete(under_way, first)
        {[{index, {:error, error}}], %{state | under_way: under_way}}
    end
  end
end
