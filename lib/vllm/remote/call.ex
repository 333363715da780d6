defmodule VLLM.Remote.Call do
  @moduledoc false
  # One call to an engine of another node, as its caller sees it. What comes back comes to the
  # caller's inbox from the VLLM.Remote.Proxy itself, of a stream from the VLLM.Remote.Pier, or, as the
  # end of the VLLM.Remote.Courier, by the VM.

  alias VLLM.Bridge.{Connection, Deadline, Inbox}
  alias VLLM.Engine.Call
  alias VLLM.Error
  alias VLLM.Remote.{Courier, Protocol, Proxy}

  @enforce_keys [:node, :courier, :address]
  defstruct @enforce_keys

  @type t :: %__MODULE__{node: node(), courier: pid(), address: Inbox.address()}

  # How much longer than to its deadline a caller waits, in ms: the other side ends the call then, and
  # knows better what it was that took so long.
  @grace 100

  @doc "Asks something of an engine that is answered once, and waits for that."
  @spec run(node(), term(), term(), Call.t()) :: term() | {:error, Error.t()}
  def run(node, engine, request, call) do
    Inbox.run(fn inbox ->
      remote = open(node, engine, request, call, inbox)
      message = Inbox.next(inbox, patience(call.deadline))
      close(remote)
      last(remote, message)
    end)
  end

  @doc "Begins a call; see `VLLM.Remote.Proxy` for what can be requested and what comes of it."
  @spec open(node(), term(), term(), Call.t(), Inbox.t()) :: t()
  def open(node, engine, request, call, inbox) do
    courier = Courier.start()
    address = Inbox.open(inbox, courier, :many)
    Courier.go(courier, node, Proxy.hello(address), {engine, request, Call.depart(call)})
    %__MODULE__{node: node, courier: courier, address: address}
  end

  @doc "Says one thing more to the other side."
  @spec tell(t(), term()) :: :ok
  def tell(remote, message), do: Courier.tell(remote.courier, message)

  @doc "Ends the call, with all that the other side still does for it."
  @spec close(t()) :: :ok
  def close(remote) do
    Inbox.close(remote.address)
    Courier.stop(remote.courier)
  end

  @doc "Ends a call that the other side hears out: it notes that what it still does for it ended with `error`."
  @spec leave(t(), Error.t()) :: :ok
  def leave(remote, error) do
    Inbox.close(remote.address)
    Courier.leave(remote.courier, error)
  end

  @doc "For how many milliseconds something that ends at `deadline` may be waited for."
  @spec patience(Deadline.t()) :: timeout()
  def patience(deadline), do: Deadline.remaining(deadline, @grace)

  @doc "What the last message of a call says, or that none came."
  @spec last(t(), Inbox.message() | :timeout) :: term() | {:error, Error.t()}
  def last(_remote, {_ref, {:answer, answer}}), do: answer
  def last(_remote, :timeout), do: {:error, Connection.timeout()}
  def last(remote, {_ref, {:down, reason}}), do: {:error, lost(remote.node, reason)}

  def last(remote, {_ref, {:incompatible, theirs}}) do
    ours = Protocol.versions()

    {:error,
     Error.new(
       :node_incompatible,
       "The node #{remote.node} has version #{theirs.version} of this library and this node has " <>
         "#{ours.version}, which do not understand each other (protocol #{theirs.protocol} there, " <>
         "#{ours.protocol} here). Give both the same version.",
       %{"node" => Atom.to_string(remote.node), "version" => theirs.version}
     )}
  end

  @doc "Whether the last message says that nothing has come to the other side."
  @spec unsent?(Inbox.message()) :: boolean()
  def unsent?({_ref, message}), do: message == {:down, {:shutdown, :noconnection}}

  defp lost(node, {:undef, _stacktrace}) do
    Error.new(
      :node_incompatible,
      "The node #{node} has not this library, or a version that other nodes cannot call. Give it " <>
        "the version of this node, #{Protocol.versions().version}.",
      %{"node" => Atom.to_string(node)}
    )
  end

  defp lost(node, {:shutdown, :noconnection}), do: unreachable(node)
  defp lost(node, :noconnection), do: down(node)
  # By its node, which ends.
  defp lost(node, :killed), do: down(node)
  # By VLLM.Cluster.Members.
  defp lost(node, {:shutdown, :silent}), do: silent(node)

  defp lost(node, _reason) do
    Error.new(
      :internal,
      "The process that served the call on the node #{node} failed; that node's log has the rest.",
      %{"node" => Atom.to_string(node)}
    )
  end

  defp down(node) do
    Error.new(
      :node_down,
      "The node #{node} was lost while the call was under way: it ended, or the link was cut. What " <>
        "had come to the engine may have been done. Of calls that take it, `retry: true` runs one " <>
        "once more.",
      %{"node" => Atom.to_string(node)}
    )
  end

  defp silent(node) do
    Error.new(
      :node_down,
      "The node #{node} has said nothing for a while: it hangs, or the link does. What had come to the " <>
        "engine may have been done.",
      %{"node" => Atom.to_string(node)}
    )
  end

  defp unreachable(node) do
    message =
      if Node.alive?(),
        do:
          "The node #{node} cannot be reached. See whether it runs under that name, whether " <>
            "`Node.ping(#{inspect(node)})` answers `:pong`, and whether both nodes have the same cookie.",
        else:
          "The engine is on the node #{node}, and this one is not distributed: it has no name that " <>
            "others reach it by. Start it with `--name` or `--sname`, and with the cookie of #{node}."

    Error.new(:node_down, message, %{"node" => Atom.to_string(node)})
  end
end
