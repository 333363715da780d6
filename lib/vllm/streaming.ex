defmodule VLLM.Streaming do
  @moduledoc false
  # Streams of deltas as lazy enumerables.

  alias VLLM.Bridge.Inbox
  alias VLLM.Engine.Call
  alias VLLM.Error
  alias VLLM.Streaming.Reader

  @doc """
  A lazy enumerable of `{:ok, %VLLM.Delta{}}`, and at last `{:error, error}` if
  it ends with one. `prepare` gives engine, method, params and call when it is
  enumerated. Whoever leaves early closes the stream.
  """
  @spec deltas((() -> {:ok, {VLLM.engine(), String.t(), map(), Call.t()}} | {:error, Error.t()})) ::
          Enumerable.t()
  def deltas(prepare), do: Inbox.stream(fn inbox -> &begin(prepare, inbox, &1, &2) end)

  # What `Stream.resource/3` and `Stream.map/2` do, which cost as much as all else does that a delta
  # goes through here.
  defp begin(prepare, inbox, {:cont, acc}, fun) do
    with {:ok, {engine, method, params, call}} <- prepare.(),
         {:ok, reader} <- Reader.open(engine, method, params, call, inbox) do
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
end
