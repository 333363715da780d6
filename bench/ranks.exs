# A real engine over two nodes, in network namespaces (test/support/switch.py), of which one part after another is
# killed under load, and the cable cut: whether all callers hear of it, nothing is left on either node, and the engine
# answers again. As root; a kill takes about as long as a start. Ends with status 1 where something is not so.
#
#     MIX_ENV=test mix run bench/ranks.exs
#     MIX_ENV=test mix run bench/ranks.exs --split pipeline --kills 4
#
#   --split   tensor (the default), pipeline or data: what is divided between the nodes
#   --kills   how many (20), each part in its turn
#   --first   the part to begin with, by its number (0)

Logger.configure(level: :error)

defmodule Bench.Ranks do
  import VLLM.OSProcess, only: [alive?: 1, eventually: 2, signal: 2]

  alias VLLM.{DemoModel, Error, FakeEngine, Network, Peers, RealEngine}

  @sizes %{
    "tensor" => [tensor_parallel_size: 2],
    "pipeline" => [pipeline_parallel_size: 2],
    "data" => [data_parallel_size: 2]
  }

  # In seconds.
  @ticktime 8

  @patience RealEngine.patience()

  # Both nodes share the cores of this machine; and of what vLLM compiles this is no test.
  @environment %{
    "VLLM_CPU_OMP_THREADS_BIND" => "nobind",
    "OMP_NUM_THREADS" => "1",
    "TORCH_COMPILE_DISABLE" => "1"
  }

  def run(%{split: split, kills: kills, first: first}) do
    network = Network.start_link(2)
    peers = Peers.launch([:head, :other], network: network, kernel: [net_ticktime: @ticktime])
    nodes = for peer <- peers, do: peer.node
    for peer <- peers, do: Peers.call(peer, System, :put_env, [@environment])

    options =
      Keyword.merge(DemoModel.options(), @sizes[split]) ++
        [model: DemoModel.path(), nodes: nodes, max_restarts: 1000, max_seconds: 1]

    options = Keyword.put(options, :name, Split)
    context = %{network: network, peers: peers, options: options}
    {took, _} = timed(fn -> serve(context) end)
    [] = Peers.call(hd(peers), DemoModel, :wrong_facts, [Split], @patience)
    IO.puts("#{split}: right answers #{took} ms after the start, of #{inspect(shown(context))}")
    IO.puts("\nwhat; callers heard; after; all gone after; right again after")
    victims = victims(context)

    Enum.reduce(0..(kills - 1), context, fn n, context ->
      round(context, Enum.at(victims, rem(first + n, length(victims))))
    end)

    for peer <- peers, do: Peers.kill(peer)
  end

  defp serve(%{peers: [head | _], options: options}),
    do: Peers.serve(head, VLLM, options, @patience)

  defp shown(%{peers: peers}),
    do: for(peer <- peers, do: for({role, _} <- Peers.processes(peer), role != :helper, do: role))

  # Each process that there is of vLLM's and ours, by its node and what it is, the nodes, and the cable.
  defp victims(%{peers: peers}) do
    parts =
      for {peer, side} <- Enum.zip(peers, [:head, :other]),
          {role, _} <- Enum.uniq_by(Peers.processes(peer), &elem(&1, 0)),
          role != :helper,
          do: {side, role}

    [:cable | parts] ++ [other: :beam, head: :beam]
  end

  defp round(%{peers: [head, other]} = context, victim) do
    before = Peers.processes(head) ++ Peers.processes(other)
    lost = for _ <- 1..4, do: Task.async(fn -> ask(head) end)
    true = eventually(fn -> in_flight(head) == 4 end, @patience)
    since = now()
    strike(context, victim)

    ends = for task <- lost, do: Task.await(task, @patience)
    heard = now() - since
    true = RealEngine.gone?(before)
    gone = now() - since
    context = mend(context, victim)
    right = Peers.call(hd(context.peers), RealEngine, :right?, [Split, [retry: true]], @patience)
    again = now() - since
    IO.puts("#{inspect(victim)}; #{inspect(Enum.frequencies(ends))}; #{heard}; #{gone}; #{again}")

    unless right and Enum.any?(ends, &(&1 != :ok)) and Enum.all?(ends, &expected?(&1, victim)),
      do: violated(victim, ends, right)

    context
  end

  defp violated(victim, ends, right) do
    IO.puts("VIOLATION at #{inspect(victim)}: #{inspect({ends, right})}")
    System.halt(1)
  end

  # With data parallelism the other engine may have had time to answer.
  defp expected?(:gone, victim), do: victim == {:head, :beam}
  defp expected?(reason, _victim), do: reason in [:ok, :engine_dead, :node_down]

  defp ask(head) do
    options = [max_tokens: 900, ignore_eos: true, temperature: 0.0, timeout: @patience]

    case Peers.call(head, VLLM, :generate, [Split, "Count:", options], @patience) do
      {:ok, _} -> :ok
      {:error, %Error{reason: reason}} -> reason
    end
  catch
    # With its node.
    :exit, _ -> :gone
  end

  defp in_flight(head), do: Peers.call(head, FakeEngine, :in_flight, [Split])

  defp strike(%{network: network}, :cable), do: Network.link(network, 2, up: 0)
  defp strike(%{peers: [_, other]}, {:other, :beam}), do: Peers.kill(other)
  defp strike(%{peers: [head, _]}, {:head, :beam}), do: Peers.kill(head)

  defp strike(%{peers: peers}, {side, role}) do
    peer = Enum.at(peers, if(side == :head, do: 0, else: 1))
    {^role, pid} = List.keyfind(Peers.processes(peer), role, 0)
    true = signal("KILL", pid)
  end

  defp mend(%{network: network} = context, :cable) do
    Network.link(network, 2)
    context
  end

  defp mend(%{peers: [head, other]} = context, {:other, :beam}),
    do: %{context | peers: [head, again(other)]}

  defp mend(%{peers: [head, other]} = context, {:head, :beam}) do
    context = %{context | peers: [again(head), other]}
    serve(context)
    context
  end

  defp mend(context, _part), do: context

  defp again(peer) do
    true = eventually(fn -> not alive?(peer.os_pid) end, @patience)
    peer = Peers.again(peer)
    Peers.call(peer, System, :put_env, [@environment])
    peer
  end

  defp timed(fun) do
    since = now()
    result = fun.()
    {now() - since, result}
  end

  defp now, do: System.monotonic_time(:millisecond)
end

{options, [], []} =
  OptionParser.parse(System.argv(), strict: [split: :string, kills: :integer, first: :integer])

Bench.Ranks.run(Map.merge(%{split: "tensor", kills: 20, first: 0}, Map.new(options)))
