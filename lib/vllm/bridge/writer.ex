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

  alias VLLM.Bridge.Frames

  @enforce_keys [:pid, :port, :queued, :max_queued]
  defstruct @enforce_keys

  @type t :: %__MODULE__{
          pid: pid(),
          port: port() | pid(),
          queued: :atomics.atomics_ref(),
          max_queued: pos_integer()
        }

  @doc "A writer for `port`, which queues up to `max_queued` bytes."
  @spec start_link(port() | pid(), pos_integer()) :: t()
  def start_link(port, max_queued) do
    queued = :atomics.new(1, signed: true)
    pid = spawn_link(fn -> loop(port, queued) end)
    %__MODULE__{pid: pid, port: port, queued: queued, max_queued: max_queued}
  end

  @doc """
  Writes a frame, or queues it.

  `:full` means that too much waits already; nothing was written. A closed port
  takes everything: its owner is about to tell whoever waits for an answer.
  """
  @spec write(t(), iodata()) :: :ok | :full
  def write(writer, frame), do: write(writer, frame, writer.max_queued)

  @doc "Like `write/2`, however much waits already. For what is small and must arrive."
  @spec push(t(), iodata()) :: :ok
  def push(writer, frame) do
    :ok = write(writer, frame, :infinity)
  end

  defp write(%__MODULE__{port: port} = writer, frame, max_queued) when is_port(port) do
    # Behind queued frames only the queue keeps the order (a cancel must not
    # overtake its request).
    if :atomics.get(writer.queued, 1) == 0 and
         :erlang.port_command(writer.port, Frames.wrap(frame), [:nosuspend]) do
      :ok
    else
      enqueue(writer, frame, max_queued)
    end
  rescue
    ArgumentError -> :ok
  end

  defp write(%__MODULE__{port: pid}, frame, _max_queued) do
    send(pid, {:frame, frame})
    :ok
  end

  defp enqueue(writer, frame, max_queued) do
    size = IO.iodata_length(frame)

    if :atomics.add_get(writer.queued, 1, size) <= max_queued do
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
          :erlang.port_command(port, Frames.wrap(frame))
        rescue
          ArgumentError -> :closed
        end

        :atomics.sub(queued, 1, size)
        loop(port, queued)
    end
  end
end
