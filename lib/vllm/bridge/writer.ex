defmodule VLLM.Bridge.Writer do
  @moduledoc false
  # Writes to the port of a run without ever suspending a caller.
  #
  # As long as the pipe takes what it is given, the calling process writes to
  # the port itself. Where it does not, frames queue up in this process, in
  # order, and it alone is suspended until the worker reads again. What may
  # queue up is bounded. The writer is linked to the owner of the port and ends
  # with it.
  #
  # A process may stand in for the port (see VLLM.Test): frames come to it as
  # `{:frame, iodata}`.

  @enforce_keys [:pid, :port, :queued]
  defstruct @enforce_keys

  @type t :: %__MODULE__{pid: pid(), port: port() | pid(), queued: :atomics.atomics_ref()}

  # Bytes that may wait for a worker that does not read.
  @max_queued 256 * 1024 * 1024

  @spec start_link(port() | pid()) :: t()
  def start_link(port) do
    queued = :atomics.new(1, signed: true)
    %__MODULE__{pid: spawn_link(fn -> loop(port, queued) end), port: port, queued: queued}
  end

  @doc """
  Writes a frame, or queues it.

  `:full` means that too much waits already; nothing was written. A closed port
  takes everything: its owner is about to tell whoever waits for an answer.
  """
  @spec write(t(), iodata()) :: :ok | :full
  def write(%__MODULE__{port: port} = writer, frame) when is_port(port) do
    # Behind queued frames only the queue keeps the order (a cancel must not
    # overtake its request).
    if :atomics.get(writer.queued, 1) == 0 and
         :erlang.port_command(writer.port, frame, [:nosuspend]) do
      :ok
    else
      enqueue(writer, frame)
    end
  rescue
    ArgumentError -> :ok
  end

  def write(%__MODULE__{port: pid}, frame) do
    send(pid, {:frame, frame})
    :ok
  end

  defp enqueue(writer, frame) do
    size = IO.iodata_length(frame)

    if :atomics.add_get(writer.queued, 1, size) <= @max_queued do
      send(writer.pid, {:write, frame, size})
      :ok
    else
      :atomics.sub(writer.queued, 1, size)
      :full
    end
  end

  defp loop(port, queued) do
    receive do
      {:write, frame, size} ->
        try do
          :erlang.port_command(port, frame)
        rescue
          ArgumentError -> :closed
        end

        :atomics.sub(queued, 1, size)
        loop(port, queued)
    end
  end
end
