defmodule VLLM.ClusterTest do
  # One name for the engines of several nodes: `a` and `b` have engines, `c` has none and calls them, and
  # so does `a`.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{ClusterChaos, Error, FakeEngine, LLM, Peers, Replica}

  doctest VLLM.Cluster

  @moduletag :tmp_dir

  setup_all do
    [a, b, c] = Peers.start([:a, :b, :c])
    for peer <- [a, b], do: serve(peer, Shared, [])
    for peer <- [a, b], do: serve(peer, Tight, max_in_flight: 1, max_queue: 0)

    for name <- [Shared, Tight], peer <- [a, c] do
      nodes = [a.node, b.node] -- [peer.node]
      Peers.cluster(peer, name: name, nodes: nodes, silent_after: 1_000)
    end

    %{a: a, b: b, c: c}
  end

  # Each test leaves all as it was, and nothing of its requests.
  setup %{a: a, b: b, c: c} = peers do
    for name <- [Shared, Tight] do
      await(c, name, %{a => :ready, b => :ready})
      # What they had before is no longer held against them.
      assert eventually(fn -> Enum.all?(serving(c, name), &match?({0, _}, &1)) end)
    end

    on_exit(fn ->
      Peers.resume(a)

      for peer <- [a, b],
          name <- [Shared, Tight],
          do: assert(eventually(fn -> idle?(peer, name) end))

      assert eventually(fn -> Enum.all?([a, b, c], &(under_way(&1) == [])) end)
    end)

    peers
  end

  describe "a name" do
    test "stands for the engines of all nodes, and that of one's own comes first", peers do
      %{a: a, b: b, c: c} = peers
      who = for n <- 1..20, do: {n, who(c, session: n)}
      assert who |> Enum.map(&elem(&1, 1)) |> Enum.uniq() |> Enum.sort() == [a.node, b.node]
      # A session stays where it is, whichever node asks.
      assert who == for(n <- 1..20, do: {n, who(c, session: n)})
      assert for(n <- 1..20, do: who(a, session: n)) == List.duplicate(a.node, 20)
      # On one without a cluster it is the engine there, as it is with the node's name everywhere.
      assert who(b, []) == b.node
      assert Peers.call(a, FakeEngine, :ask, [{Shared, b.node}, "env:WHO"]) == {:ok, "#{b.node}"}
      here = %LLM{id: Shared, model: "", node: a.node}
      assert Peers.call(a, FakeEngine, :ask, [here, "env:WHO"]) == {:ok, "#{a.node}"}

      assert {:ok, [%Replica{index: 1, state: :ready} = one, %Replica{} = two]} =
               Peers.call(c, VLLM, :replicas, [Shared])

      assert [one.node, two.node] == [a.node, b.node]
    end

    test "takes what is asked of one engine, told to all, or done to one of them", %{
      a: a,
      b: b,
      c: c
    } do
      assert {:ok, %{model: "fake"}} = Peers.call(c, VLLM, :engine_info, [Shared])
      assert {:ok, [_, _]} = Peers.call(c, VLLM, :tokenize, [Shared, "ab"])
      assert :ok = Peers.call(c, VLLM, :reset_prefix_cache, [Shared])
      assert :ok = Peers.call(a, VLLM, :await_ready, [Shared, 1000])

      for {function, args} <- [
            stop: [],
            scale: [2],
            drain: [1],
            restart: [],
            reload: [[max_queue: 1]]
          ] do
        assert {:error, %Error{reason: :unsupported} = error} =
                 Peers.call(c, VLLM, function, [Shared | args])

        assert error.message =~ inspect({Shared, a.node})
        assert error.details["nodes"] == ["#{a.node}", "#{b.node}"]
      end
    end

    test "takes streams and many prompts, which are spread", %{a: a, b: b, c: c} do
      code = """
      deltas = for {:ok, delta} <- VLLM.stream(Shared, "delta:a;delta:b;reply:ab"), do: delta.text
      ref = VLLM.stream_to(Shared, "delta:a;reply:a")
      done = receive do: ({:vllm, ^ref, {:done, output}} -> VLLM.text(output))
      ref = VLLM.stream_to(Shared, "delta:a;hold")
      receive do: ({:vllm, ^ref, %{text: "a"}} -> VLLM.cancel(ref))
      prompts = for n <- 1..30, do: "reply:\#{n}"
      many = for {index, {:ok, output}} <- VLLM.generate_stream(Shared, prompts), do: {index, VLLM.text(output)}
      [_one] = Enum.take(VLLM.generate_stream(Shared, ["reply:a", "hold", "hold"]), 1)
      list = VLLM.text(VLLM.generate!(Shared, prompts))
      error = VLLM.generate(Shared, ["reply:a", "error:internal", "hold"])
      who = VLLM.text(VLLM.generate!(Shared, List.duplicate("env:WHO", 30)))
      late = VLLM.generate(Shared, "hold", timeout: 100)
      params = %{"method" => "POST", "path" => "/v1/completions", "model" => "m"}
      params = Map.put(params, "body", ~s({"model": "m", "prompt": "answer:200:yes"}))
      {:ok, {200, _, "yes"}} = VLLM.Exchange.request(Shared, params, VLLM.Engine.Call.new(%{timeout: 60_000}))
      {:messages, left} = Process.info(self(), :messages)
      {deltas, done, Enum.sort(many), list, error, Enum.uniq(who), late, left}
      """

      numbers = for n <- 1..30, do: "#{n}"
      assert {["a", "b"], "a", many, ^numbers, error, who, late, left} = Peers.eval(c, code)
      assert many == Enum.map(1..30, &{&1 - 1, "#{&1}"})
      assert {:error, %Error{reason: :internal, details: %{"prompt_index" => 1}}} = error
      assert Enum.sort(who) == ["#{a.node}", "#{b.node}"]
      assert {:error, %Error{reason: :timeout}} = late
      assert [{:vllm, _ref, %{text: "a"}}] = left
    end

    test "that nobody has says so at the deadline", %{c: c} do
      Peers.cluster(c, name: Nobody)
      assert {:error, %Error{reason: :timeout} = error} = ask(c, Nobody, "x", timeout: 50)
      assert error.message =~ "no engine Nobody was found"
      assert {:error, %Error{reason: :queue_timeout}} = ask(c, Nobody, "x", queue_timeout: 50)
      assert {:ok, none} = Peers.call(c, VLLM.Cluster, :nodes, [Nobody])
      assert none == %{}
      again = Peers.call(c, VLLM.Cluster, :start_link, [[name: Nobody]])
      assert {:error, {:already_started, _}} = again
    end

    test "of no cluster, or of none that can be, is refused" do
      assert {:error, %Error{reason: :not_running}} = VLLM.Cluster.nodes(Unknown)
      assert {:error, %Error{details: %{"option" => "name"}}} = VLLM.Cluster.start_link([])

      for options <- [[name: {:global, :x}], [name: A, nodes: ["b"]], [name: A, silent_after: 0]],
          do: assert({:error, %Error{reason: :invalid_option}} = VLLM.Cluster.start_link(options))
    end

    @tag :slow
    test "whose engines have all failed answers with the reason", %{a: a, c: c} do
      failed = [name: Failed, model: "refuse:out_of_memory"]
      Peers.supervise(a, Peers.call(a, FakeEngine, :child_spec, [failed]))
      Peers.cluster(c, name: Failed)
      assert {:error, %Error{reason: :out_of_memory}} = ask(c, Failed, "x")
    end
  end

  describe "a request goes to another engine" do
    @tag :slow
    test "where one is full, before it is :overloaded", %{a: a, b: b, c: c, tmp_dir: dir} do
      go = Path.join(dir, "go")
      waiting = for _ <- 1..2, do: in_background(c, Tight, "wait:#{go}")
      for peer <- [a, b], do: assert(eventually(fn -> not idle?(peer, Tight) end))
      assert {:error, %Error{reason: :overloaded} = error} = ask(c, Tight, "reply:x")
      assert error.details["retry_after_ms"] > 0
      File.touch!(go)
      for task <- waiting, do: assert(Task.await(task) == {:ok, "waited"})

      # What is more than they take at once waits for its own.
      prompts = for n <- 1..10, do: "reply:#{n}"
      assert {:ok, outputs} = Peers.call(c, VLLM, :generate, [Tight, prompts])
      assert VLLM.text(outputs) == for(n <- 1..10, do: "#{n}")
    end

    @tag :slow
    test "where one drains or was stopped, until it is back", %{a: a, b: b, c: c, tmp_dir: dir} do
      go = Path.join(dir, "go")
      waiting = in_background(c, Shared, "wait:#{go}", session: mine(c, a.node))
      assert eventually(fn -> not idle?(a, Shared) end)
      drain = Task.async(fn -> Peers.call(a, VLLM, :drain, [{Shared, a.node}, 1]) end)
      assert eventually(fn -> match?({:ok, [%{state: :draining}]}, replicas(a)) end)
      # At once, for nobody has begun with what it refuses.
      for n <- 1..10, do: assert(who(c, session: n) == b.node)
      # On the node itself, too.
      assert who(a, []) == b.node
      File.touch!(go)
      assert Task.await(waiting) == {:ok, "waited"}
      assert Task.await(drain, 60_000) == :ok
      assert eventually(fn -> match?(%Error{reason: :not_running}, nodes(c, Shared)[a.node]) end)
      assert :ok = Peers.call(a, VLLM, :restart, [{Shared, a.node}])
      await(c, Shared, %{a => :ready, b => :ready})
      assert who(a, []) == a.node

      assert :ok = Peers.call(c, VLLM, :stop, [{Tight, b.node}])
      for n <- 1..10, do: assert({:ok, "x"} = ask(c, Tight, "reply:x", session: n))
      await(c, Tight, %{a => :ready})
      serve(b, Tight, max_in_flight: 1, max_queue: 0)
      await(c, Tight, %{a => :ready, b => :ready})
    end

    @tag :slow
    test "where the node hangs, unless it has begun or must not be run again", peers do
      %{a: a, b: b, c: c} = peers
      session = mine(c, a.node)
      occupy(b, c)
      retried = in_background(c, Shared, "hold", session: session, retry: true)
      begun = stream(c, "delta:a;hold", session: session, retry: true)
      once = in_background(c, Shared, "hold", session: session, timeout: 4_000)
      assert eventually(fn -> held(a) == 3 end)
      Peers.pause(a)
      assert eventually(fn -> held(b) == 5 end)
      assert nodes(c, Shared)[a.node] == :silent
      assert who(c, session: session) == b.node
      assert {:ok, [%Replica{node: node}]} = Peers.call(c, VLLM, :replicas, [Shared])
      assert node == b.node
      release(b)
      assert Task.await(retried) == {:ok, "released"}
      assert {:error, %Error{reason: :timeout}} = Task.await(once, 30_000)
      Peers.resume(a)
      await(c, Shared, %{a => :ready, b => :ready})
      # What another engine has done meanwhile was given up; what had begun goes on.
      assert eventually(fn -> held(a) == 1 end)
      release(a)
      assert [{:ok, %{text: "a"}}] = Task.await(begun)
      assert who(c, session: session) == a.node
    end

    test "where the link is cut, and is connected again", %{a: a, b: b, c: c} do
      session = mine(c, a.node)
      occupy(b, c)
      once = in_background(c, Shared, "hold", session: session)
      begun = stream(c, "delta:a;hold", session: session, retry: true)
      retried = stream(c, "hold", session: session, retry: true)
      assert eventually(fn -> held(a) == 3 end)
      Peers.call(c, Node, :disconnect, [a.node])
      assert {:error, %Error{reason: :node_down}} = Task.await(once)
      assert [{:ok, %{text: "a"}}, {:error, %Error{reason: :node_down}}] = Task.await(begun)
      # Erlang may have cut the other one as well.
      assert eventually(fn -> held(a) == 1 or held(b) == 5 end)
      for peer <- [a, b], do: release(peer)
      assert Task.await(retried) == []
      await(c, Shared, %{a => :ready, b => :ready})
    end
  end

  @tag :slow
  test "a node that is killed takes along what may not be run again; one that comes is used",
       %{a: a, b: b, c: c} do
    [victim] = Peers.start([:victim], beside: a)
    true = Peers.call(victim, Node, :connect, [c.node])
    serve(victim, Shared, [])
    assert eventually(fn -> nodes(c, Shared)[victim.node] == :ready end)
    session = mine(c, victim.node)
    for peer <- [a, b], do: occupy(peer, c)
    once = in_background(c, Shared, "hold", session: session)
    retried = in_background(c, Shared, "hold", session: session, retry: true)
    code = "VLLM.generate_stream(Shared, many, session: session, retry: true) |> Enum.sort()"
    many = [many: ["reply:x", "hold", "error:internal", "hold"], session: session]
    many = Task.async(fn -> Peers.eval(c, code, many) end)
    assert eventually(fn -> held(victim) == 4 end)
    Peers.kill(victim)
    assert {:error, %Error{reason: :node_down} = error} = Task.await(once)
    assert error.details["node"] == "#{victim.node}"
    assert eventually(fn -> held(a) + held(b) == 8 + 3 end)
    for peer <- [a, b], do: release(peer)
    assert Task.await(retried) == {:ok, "released"}

    texts =
      for {index, result} <- Task.await(many) do
        case result do
          {:ok, output} -> {index, VLLM.text(output)}
          {:error, error} -> {index, error.reason}
        end
      end

    assert texts == [{0, "x"}, {1, "released"}, {2, :internal}, {3, "released"}]
  end

  @tag :slow
  test "no request is lost, crossed or left while nodes are killed, stopped, cut off and drained" do
    options = %{seed: :rand.uniform(1000), requests: 300, callers: 6, rest: 500, pause: 1_000}
    account = ClusterChaos.run(options)
    assert account.violations == [], IO.iodata_to_binary(ClusterChaos.describe(account))
    assert map_size(account.faults) > 1
  end

  defp serve(peer, name, options) do
    env = %{"WHO" => "#{peer.node}"}
    # The tests have them begin anew more often than engines should.
    Peers.serve(peer, [name: name, model: "ready", env: env, max_restarts: 1000] ++ options)
  end

  defp ask(peer, name, prompt, options \\ []),
    do: Peers.call(peer, FakeEngine, :ask, [name, prompt, options])

  defp in_background(peer, name, prompt, options \\ []),
    do: Task.async(fn -> ask(peer, name, prompt, options) end)

  defp stream(peer, prompt, options) do
    code = "Enum.to_list(VLLM.stream(Shared, prompt, options))"
    Task.async(fn -> Peers.eval(peer, code, prompt: prompt, options: options) end)
  end

  # Which node answers.
  defp who(peer, options) do
    {:ok, node} = ask(peer, Shared, "env:WHO", options)
    String.to_atom(node)
  end

  # So that others, by what the caller knows, are not busier with a few.
  defp occupy(peer, caller) do
    for _ <- 1..4, do: in_background(peer, {Shared, peer.node}, "hold")

    assert eventually(fn ->
             Enum.any?(serving(caller, Shared), fn {load, member} ->
               load == 4 and member.index == peer.node
             end)
           end)
  end

  # Which engines a node knows, and how busy.
  defp serving(peer, name) do
    code = "VLLM.Cluster.Members.serving(VLLM.Cluster.Members.find(name))"
    Peers.eval(peer, code, name: name)
  end

  # A session that a node's engine has.
  defp mine(peer, node), do: Enum.find(1..1000, &(who(peer, session: &1) == node))

  defp replicas(peer), do: Peers.call(peer, VLLM, :replicas, [here(peer)])

  defp nodes(peer, name) do
    {:ok, nodes} = Peers.call(peer, VLLM.Cluster, :nodes, [name])
    nodes
  end

  defp await(peer, name, standings) do
    expected = Map.new(standings, fn {%{node: node}, standing} -> {node, standing} end)
    assert eventually(fn -> nodes(peer, name) == expected end)
  end

  defp here(peer), do: %LLM{id: Shared, model: "", node: peer.node}

  defp held(peer) do
    {:ok, count} = Peers.call(peer, FakeEngine, :ask, [here(peer), "held"])
    String.to_integer(count)
  end

  defp release(peer),
    do: {:ok, "released"} = Peers.call(peer, FakeEngine, :ask, [here(peer), "release"])

  defp idle?(peer, name),
    do:
      Peers.call(peer, FakeEngine, :in_flight, [%LLM{id: name, model: "", node: peer.node}]) == 0

  defp under_way(peer), do: Peers.call(peer, ClusterChaos, :under_way, [])
end
