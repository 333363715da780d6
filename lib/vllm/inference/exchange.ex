defmodule VLLM.Exchange do
  @moduledoc false
  # One HTTP request that vLLM's own API app answers, in the worker: a request
  # like others, so that admission, deadlines, the choice of a replica, draining,
  # hangs and what happens when a worker dies are those of every call.

  alias VLLM.Bridge.Inbox
  alias VLLM.Engine.Call
  alias VLLM.{Error, Inference}
  alias VLLM.Streaming.Reader

  @typedoc """
  What the app answers. The body is whole, or it comes bit by bit: then it is an enumerable of
  `{:ok, piece}`, with `{:error, error}` at last where it breaks off. It must be read once, by the
  process that asked; leaving it early cancels the request.
  """
  @type answer :: {100..599, [{String.t(), String.t()}], binary() | Enumerable.t()}

  @doc "Has the engine answer a request, of which `params` are those of `http_request` (see guides/protocol.md)."
  @spec request(VLLM.engine(), map(), Call.t()) :: {:ok, answer()} | {:error, Error.t()}
  def request(engine, params, call) do
    inbox = Inbox.new()

    params = Inference.timed(params, call.timeout)

    with {:ok, reader} <- Reader.open(engine, "http_request", params, call, inbox),
         do: head(Reader.next(reader))
  end

  defp head({{:done, answer}, reader}) do
    Inbox.flush(reader.inbox)
    {:ok, {answer["status"], pairs(answer["headers"]), answer["body"]}}
  end

  defp head({{:delta, [status, headers]}, reader}) do
    {:ok, {status, pairs(headers), Stream.resource(fn -> reader end, &next/1, &leave/1)}}
  end

  defp head({{:delta, _piece}, reader}) do
    Reader.close(reader)
    {:error, Error.new(:protocol, "The worker sent a piece of an answer before its head.")}
  end

  defp head({{:error, error}, reader}) do
    Inbox.flush(reader.inbox)
    {:error, error}
  end

  defp next({:ended, _inbox} = ended), do: {:halt, ended}

  defp next(reader) do
    case Reader.next(reader) do
      {{:delta, [piece]}, reader} -> {[{:ok, piece}], reader}
      {{:delta, _head}, reader} -> {[], reader}
      {{:done, %{"body" => ""}}, reader} -> {:halt, {:ended, reader.inbox}}
      {{:done, %{"body" => rest}}, reader} -> {[{:ok, rest}], {:ended, reader.inbox}}
      {{:error, error}, reader} -> {[{:error, error}], {:ended, reader.inbox}}
    end
  end

  # What has come after the end, such as that of the process that brought it, is for nobody.
  defp leave({:ended, inbox}), do: Inbox.flush(inbox)
  defp leave(reader), do: Reader.close(reader)

  defp pairs(headers), do: Enum.map(headers, &List.to_tuple/1)
end
