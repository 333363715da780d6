defmodule VLLM.Bridge.Inbox do
  @moduledoc false
  # What comes to a process for one call of its: answers to requests, deltas and
  # turns. Each such message begins with the reference of the inbox.
  #
  # The VM notes where the mailbox ended when such a reference was made, and a
  # receive that asks for it looks at nothing before that place. So a call costs
  # the same however many messages of others its caller has not read yet. The
  # note lasts as long as the function that made the reference (and is made only
  # where that function has a receive for it): hence `run/1` and `stream/1`.
  # Outside of them, and where the note is lost, an inbox is slower and as right.

  @type t :: reference()

  @typedoc "Where messages are sent to: the inbox, and an alias or monitor of its process."
  @type address :: {t(), reference()}

  @typedoc """
  What came, and from whom: `{:down, reason}` is the end of a process that was monitored; `:caller` is one
  on another node, whose messages a VLLM.Remote.Proxy gets.
  """
  @type message :: {reference(), term() | {:down, term()}} | {:alarm, :over} | {:caller, term()}

  @doc "An inbox for a process that takes its messages from elsewhere, such as a GenServer."
  @spec new() :: t()
  def new, do: make_ref()

  @doc "Runs `function` with an inbox; what is left in it then is dropped."
  @spec run((t() -> result)) :: result when result: term()
  def run(function) do
    inbox = make_ref()
    result = function.(inbox)
    drop_all(inbox)
    result
  end

  @doc "An enumerable that is made anew, with an inbox of its own, each time that it is enumerated."
  @spec stream((t() -> Enumerable.t())) :: Enumerable.t()
  def stream(function) do
    fn acc, reducer ->
      inbox = make_ref()
      leave(Enumerable.reduce(function.(inbox), acc, reducer), inbox)
    end
  end

  # It goes on another time, with what is in the inbox.
  defp leave({:suspended, acc, continuation}, inbox),
    do: {:suspended, acc, &leave(continuation.(&1), inbox)}

  defp leave(ended, inbox) do
    drop_all(inbox)
    ended
  end

  @doc """
  An address whose messages come to `inbox`, and `{:down, reason}` at the end of `pid`. One answer
  closes it (`:once`), or `close/1` does (`:many`).
  """
  @spec open(t(), pid(), :once | :many) :: address()
  # Nobody can monitor himself.
  def open(inbox, pid, :once) when pid == self(), do: {inbox, :erlang.alias([:reply])}
  def open(inbox, pid, :once), do: {inbox, monitor(inbox, pid, :reply_demonitor)}
  def open(inbox, pid, :many), do: {inbox, monitor(inbox, pid, :demonitor)}

  defp monitor(inbox, pid, closing),
    do: :erlang.monitor(:process, pid, alias: closing, tag: inbox)

  @doc """
  Has `{:alarm, :over}` come to `inbox` at a deadline, unless `cancel_alarm/1` is called before. One such
  timer costs less than those of many receives.
  """
  @spec alarm(t(), integer()) :: reference()
  def alarm(inbox, deadline),
    do: :erlang.send_after(deadline, self(), {inbox, :alarm, :over}, abs: true)

  @doc "The alarm does not come any more; one that has come is still there."
  @spec cancel_alarm(reference()) :: :ok
  def cancel_alarm(alarm) do
    :erlang.cancel_timer(alarm)
    :ok
  end

  @doc "Nothing comes by this address any more; what has come is still there."
  @spec close(address()) :: :ok
  def close({_inbox, ref}) do
    Process.demonitor(ref)
    :ok
  end

  @doc "Sends to an address; the VM drops what comes to one that is closed."
  @spec send(address(), term()) :: :ok
  def send({inbox, ref}, message) do
    Kernel.send(ref, {inbox, ref, message})
    :ok
  end

  @doc "Takes the next message, unless there is none for `timeout` milliseconds."
  @spec next(t(), timeout()) :: message() | :timeout
  def next(inbox, timeout), do: take(inbox, timeout)

  # Private, as is what calls it with a new reference: only so does the compiler see that they
  # belong together.
  defp take(inbox, timeout) do
    receive do
      {^inbox, ref, message} -> {ref, message}
      {^inbox, ref, :process, _pid, reason} -> {ref, {:down, reason}}
    after
      timeout -> :timeout
    end
  end

  @doc "What a message says that a process got from its mailbox by itself."
  @spec read(tuple()) :: message()
  def read({_inbox, ref, message}), do: {ref, message}
  def read({_inbox, ref, :process, _pid, reason}), do: {ref, {:down, reason}}

  @doc "Drops what is there."
  @spec flush(t()) :: :ok
  def flush(inbox), do: drop_all(inbox)

  defp drop_all(inbox),
    do: if(take(inbox, 0) == :timeout, do: :ok, else: drop_all(inbox))
end
