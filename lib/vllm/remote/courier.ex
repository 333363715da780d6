defmodule VLLM.Remote.Courier do
  @moduledoc false
  # Carries what a caller says to the engine's node: one process on the caller's own node for each
  # call. Only it may have to wait for the distribution, which connects, and which holds a sender
  # back while its channel is full; a caller who waits no more leaves it behind or kills it, and so
  # ends at its deadline also where the other node hangs.
  #
  # It is linked to the VLLM.Remote.Proxy on the other side. So either ends with the other, with the
  # node of the other and with the link between the two, and both end with the caller. Only after a
  # `leave/2` the proxy ends by itself.

  alias VLLM.Error
  alias VLLM.Remote.Proxy

  @doc "Starts one for the calling process, which then has it `go/4`."
  @spec start() :: pid()
  def start do
    caller = self()

    spawn(fn ->
      Process.monitor(caller)

      receive do
        {:go, node, hello, request} -> connect(node, hello, request)
        {:DOWN, _, :process, ^caller, _} -> :ok
      end
    end)
  end

  @doc "Has it bring `request` to a new proxy on `node`, whom it greets with `hello`."
  @spec go(pid(), node(), Proxy.hello(), term()) :: :ok
  def go(courier, node, hello, request) do
    send(courier, {:go, node, hello, request})
    :ok
  end

  @doc "Has it bring one thing more."
  @spec tell(pid(), term()) :: :ok
  def tell(courier, message) do
    send(courier, {:tell, message})
    :ok
  end

  @doc "Has it bring as the last thing that the caller leaves, for whom the call ended with `error`."
  @spec leave(pid(), Error.t()) :: :ok
  def leave(courier, error) do
    # One that the distribution holds would first bring what is not wanted any more.
    if Process.info(courier, :status) == {:status, :suspended} do
      stop(courier)
    else
      send(courier, {:leave, error})
      :ok
    end
  end

  @doc "Ends it and its proxy."
  @spec stop(pid()) :: :ok
  def stop(courier) do
    Process.exit(courier, :kill)
    :ok
  end

  @doc "Ends it, as its caller is told, because the other node has said nothing for too long."
  @spec give_up(pid()) :: :ok
  def give_up(courier) do
    Process.exit(courier, {:shutdown, :silent})
    :ok
  end

  # The request is no argument: what a node without this library prints of the call that it cannot
  # make has no prompt in it.
  defp connect(node, %{address: {inbox, _}} = hello, request) do
    ref = :erlang.spawn_request(node, Proxy, :serve, [hello], [:link])

    receive do
      {:spawn_reply, ^ref, :ok, proxy} ->
        carry(proxy, inbox, request)

      {:spawn_reply, ^ref, :error, reason} ->
        exit({:shutdown, reason})

      # A proxy that comes to be nevertheless ends by the link.
      {:leave, _error} ->
        exit(:shutdown)

      {:DOWN, _, :process, _caller, _} ->
        exit(:shutdown)
    end
  end

  defp carry(proxy, inbox, message) do
    send(proxy, {inbox, :caller, message})

    receive do
      {:tell, message} -> carry(proxy, inbox, message)
      # A normal end leaves the proxy time to hear this.
      {:leave, _error} = last -> send(proxy, {inbox, :caller, last})
      {:DOWN, _, :process, _caller, _} -> exit(:shutdown)
    end
  end
end
