defmodule VLLM.Streaming do
  @moduledoc false
  # Streams of deltas as lazy enumerables.

  alias VLLM.Bridge.Inbox
  alias VLLM.Engine.Call
  alias VLLM.{Delta, Error}
  alias VLLM.Streaming.Reader

  @doc """
  A lazy enumerable of `{:ok, %VLLM.Delta{}}`, and at last `{:error, error}` if
  it ends with one. `prepare` gives engine, method, params and call when it is
  enumerated. Whoever leaves early closes the stream.
  """
  @spec deltas((() -> {:ok, {VLLM.engine(), String.t(), map(), Call.t()}} | {:error, Error.t()})) ::
          Enumerable.t()
  def deltas(prepare), do: stream(prepare, :tagged)

  @doc "The same of deltas alone; an error is raised."
  @spec deltas!((() -> {:ok, {VLLM.engine(), String.t(), map(), Call.t()}} | {:error, Error.t()})) ::
          Enumerable.t()
  def deltas!(prepare), do: stream(prepare, :bare)

  defp stream(prepare, form),
    do: Inbox.stream(fn inbox -> &begin(prepare, form, inbox, &1, &2) end)

  # What `Stream.resource/3` and `Stream.map/2` do, which cost as much as all else does that a delta
  # goes through here. Between two deltas all that a process has leaves the caches, so that each further
  # function that a delta is handed to costs like a tenth of its way.
  defp begin(prepare, form, inbox, {:cont, acc}, fun) do
    with {:ok, {engine, method, params, call}} <- prepare.(),
         {:ok, reader} <- Reader.open(engine, method, params, call, inbox) do
      read(reader, form, {:cont, acc}, fun)
    else
      {:error, error} -> failed(error, form, acc, fun)
    end
  end

  defp begin(prepare, form, inbox, {:suspend, acc}, fun),
    do: {:suspended, acc, &begin(prepare, form, inbox, &1, fun)}

  defp begin(_prepare, _form, _inbox, {:halt, acc}, _fun), do: {:halted, acc}

  defp read(reader, form, {:cont, acc}, fun) do
    case Reader.free(reader) do
      0 -> event(next(reader), form, acc, fun)
      free -> flow(reader.inbox, free, reader, form, {:cont, acc}, fun)
    end
  end

  defp read(reader, form, {:suspend, acc}, fun),
    do: {:suspended, acc, &read(reader, form, &1, fun)}

  defp read(reader, _form, {:halt, acc}, _fun) do
    Reader.close(reader)
    {:halted, acc}
  end

  defp event({{:delta, delta}, reader}, form, acc, fun),
    do: read(reader, form, give(reader, form, delta, acc, fun), fun)

  defp event({{:done, _output}, _reader}, _form, acc, _fun), do: {:done, acc}
  defp event({{:error, error}, _reader}, form, acc, fun), do: failed(error, form, acc, fun)

  # What `Reader.next/1` does, for most deltas, with no more of the reader than how many are free.
  defp flow(inbox, free, reader, form, {:cont, acc}, fun) do
    case Inbox.next(inbox, :infinity) do
      {_ref, {:delta, text, token_ids}} when free > 1 ->
        acc = give(reader, form, Delta.of_text(text, token_ids), acc, fun)
        flow(inbox, free - 1, reader, form, acc, fun)

      message ->
        reader |> Reader.left(free) |> take(message) |> event(form, acc, fun)
    end
  end

  defp flow(_inbox, free, reader, form, other, fun),
    do: read(Reader.left(reader, free), form, other, fun)

  # Whatever raises, here or in whom it is for, closes the stream.
  defp next(reader) do
    Reader.next(reader)
  catch
    kind, reason -> close(reader, kind, reason, __STACKTRACE__)
  end

  defp take(reader, message) do
    Reader.take(reader, message)
  catch
    kind, reason -> close(reader, kind, reason, __STACKTRACE__)
  end

  defp give(reader, form, delta, acc, fun) do
    fun.(if(form == :tagged, do: {:ok, delta}, else: delta), acc)
  catch
    kind, reason -> close(reader, kind, reason, __STACKTRACE__)
  end

  defp close(reader, kind, reason, stacktrace) do
    Reader.close(reader)
    :erlang.raise(kind, reason, stacktrace)
  end

  defp failed(error, :tagged, acc, fun), do: ended(fun.({:error, error}, acc))
  defp failed(error, :bare, _acc, _fun), do: raise(error)

  defp ended({:cont, acc}), do: {:done, acc}
  defp ended({:suspend, acc}), do: {:suspended, acc, &ended/1}
  defp ended({:halt, acc}), do: {:halted, acc}
end
