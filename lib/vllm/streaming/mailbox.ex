defmodule VLLM.Streaming.Mailbox do
  @moduledoc false
  # Whether the receiver of a stream keeps up, as its node sees it.

  # A receiver with this many messages in its mailbox is busy; how often a busy one
  # is to be looked at again, in ms.
  @busy 64
  @look_again 10

  @doc "From how many messages on a receiver is busy."
  @spec busy() :: pos_integer()
  def busy, do: @busy

  @doc "After how many milliseconds a busy one is to be looked at again."
  @spec look_again() :: pos_integer()
  def look_again, do: @look_again

  @doc "Whether a process of this node is; one that has ended is not."
  @spec busy?(pid()) :: boolean()
  def busy?(pid), do: room(pid) == 0

  @doc """
  How many messages such a process may be sent before it is to be looked at again, which costs as much as
  a message: none while it is busy, and few enough that several streams overfill it little.
  """
  @spec room(pid()) :: non_neg_integer()
  def room(pid) do
    case Process.info(pid, :message_queue_len) do
      {:message_queue_len, length} when length >= @busy -> 0
      {:message_queue_len, length} -> max(div(@busy - length, 8), 1)
      nil -> 1
    end
  end
end
