defmodule VLLM.Streaming.Forwarded do
  @moduledoc false
  # The streams to processes that this node forwards, by their references, and how one is cancelled.

  alias VLLM.Bridge.Connection

  @doc "Notes that the calling process forwards the stream `ref` to `receiver`."
  @spec note(reference(), pid()) :: :ok
  def note(ref, receiver) do
    {:ok, _} = Registry.register(VLLM.Registry, {:stream, ref}, receiver)
    :ok
  end

  @doc "Ends the stream, and tells the receiver that it was aborted unless that is `caller`."
  @spec cancel(reference(), pid()) :: :ok
  def cancel(ref, caller) do
    for true <- [VLLM.Started.yet?()],
        {pid, receiver} <- Registry.lookup(VLLM.Registry, {:stream, ref}) do
      monitor = Process.monitor(pid)
      # If several processes cancel at once, only the one whose reason it was tells the receiver.
      reason = {:shutdown, {:cancelled, monitor}}
      # The engine's worker monitors readers and aborts the request.
      Process.exit(pid, reason)

      receive do
        {:DOWN, ^monitor, :process, _, ^reason} when receiver != caller ->
          send(receiver, {:vllm, ref, {:error, Connection.aborted()}})

        {:DOWN, ^monitor, :process, _, _} ->
          :ok
      end
    end

    :ok
  end
end
