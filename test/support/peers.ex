defmodule VLLM.Peers do
  @moduledoc """
  Nodes of Erlang's distribution with the library in them, each a BEAM of its own on an address of
  the loopback interface or of a `VLLM.Network`, so that none needs epmd or this BEAM to have a name. They
  are told what to do over their standard input, and end with it.
  """

  import VLLM.OSProcess

  alias VLLM.{Footprint, Network}

  @enforce_keys [:node, :peer, :os_pid, :net, :start]
  defstruct @enforce_keys

  # How long a peer may take to answer, in ms.
  @patience 60_000

  @doc """
  Starts one of each of `names`; all are gone at the end of the test or of the test file. They can
  reach each other, and those of `beside`. A node that is `bare` has nothing of the library.
  """
  def start(names, options \\ []) do
    peers = launch(names, options)

    for peer <- peers,
        do: ExUnit.Callbacks.on_exit({__MODULE__, peer.node}, fn -> kill(peer) end)

    peers
  end

  @doc """
  The same outside of tests; they are gone at the end of this BEAM. Of a `network`, the first is in its first
  namespace; `kernel` are more settings of Erlang's kernel.
  """
  def launch(names, options \\ []) do
    net =
      if beside = options[:beside],
        do: %{beside.net | first: beside.net.first + 16},
        else: Map.merge(net(), Map.new(Keyword.take(options, [:network, :kernel])))

    paths = if options[:bare], do: [], else: Enum.flat_map(:code.get_path(), &["-pa", "#{&1}"])

    names
    |> Enum.with_index(net.first)
    |> Enum.map(fn {name, n} ->
      start = fn -> start_one(name, n, net, paths, !options[:bare]) end
      Task.async(fn -> %{start.() | start: start} end)
    end)
    |> Task.await_many(60_000)
  end

  @doc "Starts one anew that was killed, under its name."
  def again(%{start: start}), do: %{start.() | start: start}

  # Addresses, a port and a cookie of their own: others on this machine test, too.
  defp net do
    <<a, b, port::16>> = :rand.bytes(4)
    cookie = Base.encode16(:rand.bytes(16))
    net = %{a: a, b: b, first: 1, port: 20_000 + rem(port, 12_000), cookie: cookie}
    Map.merge(net, %{network: nil, kernel: []})
  end

  defp address(%{network: nil, a: a, b: b}, n), do: {{127, a, b, n}, []}
  defp address(%{network: network}, n), do: {Network.address(n), Network.command(network, n)}

  defp start_one(name, n, %{port: port} = net, paths, library?) do
    {ip, within} = address(net, n)
    settings = for {key, value} <- net.kernel, setting <- [key, value], do: "#{setting}"

    args =
      ~w(-setcookie #{net.cookie} -start_epmd false -erl_epmd_port #{port}) ++
        ["-kernel", "inet_dist_use_interface", ip |> :io_lib.print() |> to_string()] ++
        ~w(logger_level none inet_dist_listen_min #{port} inet_dist_listen_max #{port}) ++
        settings ++
        ~w(+sbwt none +sbwtdcpu none +sbwtdio none) ++ paths

    {:ok, peer, node} =
      :peer.start(%{
        # Unique, for where an epmd of the machine is asked (see `join/1`).
        name: :"#{name}_#{net.a}_#{net.b}",
        host: :inet.ntoa(ip),
        longnames: true,
        connection: :standard_io,
        wait_boot: @patience,
        # Stopped or not, it does not outlive this BEAM.
        exec:
          {:os.find_executable('setpriv'),
           Enum.map(~w(--pdeathsig KILL) ++ within ++ ["erl"], &to_charlist/1)},
        args: Enum.map(args, &to_charlist/1)
      })

    os_pid = :peer.call(peer, :os, :getpid, [], 60_000)

    if library?,
      do: {:ok, _} = :peer.call(peer, :application, :ensure_all_started, [:ex_vllm], 60_000)

    %__MODULE__{node: node, peer: peer, os_pid: List.to_integer(os_pid), net: net, start: nil}
  end

  @doc "Has it serve an engine of the fake worker, or of a script, that has a name."
  def serve(peer, module \\ VLLM.FakeEngine, options, timeout \\ @patience) do
    spec = call(peer, module, :child_spec, [options])
    pid = supervise(peer, spec)
    llm = %VLLM.LLM{id: options[:name] || pid, model: "", node: peer.node}
    :ok = call(peer, VLLM, :await_ready, [llm, timeout], timeout + 1_000)
    pid
  end

  @doc "Has it serve two engines: `Scripted`, of a script, and `Far`, of the fake worker."
  def serve_both(peer, script) do
    serve(peer, VLLM.Test, name: Scripted, script: script)
    # Those who ask it have it die more often than engines should.
    deaths = [max_restarts: 1000, max_seconds: 1]
    serve(peer, [name: Far, model: "ready", max_frame: 1_000_000] ++ deaths)
  end

  @doc "Has it run a child of a supervision tree."
  def supervise(peer, spec) do
    {:ok, pid} = call(peer, DynamicSupervisor, :start_child, [VLLM.EngineSupervisor, spec])
    pid
  end

  @doc "Has it know the engines of that name on all nodes it is connected to."
  def cluster(peer, options), do: supervise(peer, VLLM.Cluster.child_spec(options))

  @doc """
  Connects this BEAM to a peer, so that the peer can call engines of this one; until the end of the
  test it has a name. Returns that.
  """
  def join(%{net: net} = peer) do
    name = :"tests@127.#{net.a}.#{net.b}.100"
    epmd = tell_of(peer)
    # It listens to nobody, so that only the peer has to be found.
    {:ok, _} = :net_kernel.start(name, %{name_domain: :longnames, dist_listen: false})
    ExUnit.Callbacks.on_exit(fn -> :net_kernel.stop() end)
    Node.set_cookie(peer.node, String.to_atom(net.cookie))
    true = Node.connect(peer.node)
    epmd.()
    name
  end

  # An epmd of the machine knows the peer. Where there is none, a process answers for one, which knows nobody
  # else. Returns what ends it.
  defp tell_of(%{net: %{port: port}} = peer) do
    [name, host] = String.split(Atom.to_string(peer.node), "@")
    {:ok, address} = :inet.parse_address(to_charlist(host))
    options = [:binary, ip: address, active: false, reuseaddr: true]

    case :gen_tcp.listen(4369, options) do
      {:ok, epmd} ->
        answer =
          Task.async(fn ->
            {:ok, asked} = :gen_tcp.accept(epmd)
            {:ok, <<_size::16, ?z, ^name::binary>>} = :gen_tcp.recv(asked, 0)
            # Found, of a node that speaks versions 5 and 6.
            :ok =
              :gen_tcp.send(
                asked,
                <<119, 0, port::16, 77, 0, 6::16, 5::16, byte_size(name)::16, name::binary,
                  0::16>>
              )

            :gen_tcp.close(asked)
          end)

        fn ->
          Task.await(answer)
          :gen_tcp.close(epmd)
        end

      {:error, :eaddrinuse} ->
        fn -> :ok end
    end
  end

  @doc "Calls a function there, as a process of that node."
  def call(peer, module, function, args, timeout \\ @patience),
    do: :peer.call(peer.peer, module, function, args, timeout)

  @doc "Evaluates code there, with `bindings`."
  def eval(peer, code, bindings \\ []) do
    {result, _} = call(peer, Code, :eval_string, [code, bindings])
    result
  end

  @doc "The processes there of engines, by what they are, see `VLLM.Footprint.roles/1`."
  def processes(peer) do
    for guard <- call(peer, Footprint, :guards, []),
        process <- Footprint.roles(guard),
        do: process
  end

  @doc "The processes there that carry calls to or from another node."
  def carriers(peer), do: call(peer, __MODULE__, :carriers, [])

  @doc "Those of this node."
  def carriers do
    for pid <- Process.list(),
        {:current_stacktrace, stack} <- [Process.info(pid, :current_stacktrace)],
        Enum.any?(stack, &(elem(&1, 0) in [VLLM.Remote.Courier, VLLM.Remote.Proxy])),
        do: pid
  end

  @doc "Stops it as Ctrl-Z does; `resume/1` has it go on."
  def pause(peer), do: signal("STOP", peer.os_pid)
  def resume(peer), do: signal("CONT", peer.os_pid)

  @doc "Kills it."
  def kill(peer), do: signal("KILL", peer.os_pid)
end
