defmodule VLLM.NodesTest do
  # An engine over two nodes, of the fake worker on both: `head` has the engine, `other` a rank of it.
  # test/real/nodes_test.exs has a real one.
  use ExUnit.Case, async: true

  import VLLM.OSProcess

  alias VLLM.{Error, FakeEngine, Footprint, Peers}
  alias VLLM.Engine.Config

  # For machines that are busy.
  @moduletag timeout: 600_000

  @options [name: Split, model: "ready", tensor_parallel_size: 2, max_restarts: 1000]

  setup_all do
    [head, other] = Peers.start([:head, :other])
    %{head: head, other: other}
  end

  defp nodes(peers), do: Enum.map(peers, & &1.node)

  # What starts one; the result of waiting for it comes from `await/2`.
  defp start(head, other, options) do
    options = Keyword.merge(@options ++ [nodes: nodes([head, other])], options)
    spec = Peers.call(head, FakeEngine, :child_spec, [options])

    {:ok, _} = Peers.call(head, DynamicSupervisor, :start_child, [VLLM.EngineSupervisor, spec])
    on_exit(fn -> if alive?(head.os_pid), do: Peers.call(head, VLLM, :stop, [Split]) end)
  end

  defp await(head), do: Peers.call(head, VLLM, :await_ready, [Split, 30_000])

  defp ask(head, prompt, options \\ []),
    do: Peers.call(head, FakeEngine, :ask, [Split, prompt, [timeout: 30_000] ++ options])

  # A request that is under way.
  defp hold(head) do
    held = Task.async(fn -> ask(head, "hold") end)
    :ok = Peers.call(head, FakeEngine, :await_held, [Split, 1])
    held
  end

  defp guards(peer), do: Peers.call(peer, Footprint, :guards, [])

  defp processes(peer),
    do: for(guard <- guards(peer), pid <- [guard | descendants(guard)], do: pid)

  defp gone?(pids), do: eventually(fn -> not Enum.any?(pids, &alive?/1) end)

  defp ends_and_begins_anew(%{head: head, other: other}, victim) do
    assert :ok = await(head)
    held = hold(head)
    [guard] = guards(head)
    [rank_guard] = guards(other)
    before = processes(head) ++ processes(other)

    case victim do
      :rank -> signal("KILL", FakeEngine.worker_pid(rank_guard))
      :rank_guard -> signal("KILL", rank_guard)
      :head -> signal("KILL", FakeEngine.worker_pid(guard))
      :head_guard -> signal("KILL", guard)
      :link -> Peers.call(head, :erlang, :disconnect_node, [other.node])
    end

    assert {victim, {:error, %Error{reason: reason} = error}} = {victim, Task.await(held, 30_000)}
    assert reason == if(victim == :link, do: :node_down, else: :engine_dead)

    if victim in [:rank, :rank_guard, :link],
      do: assert(error.details["node"] == Atom.to_string(other.node))

    assert {victim, true} == {victim, gone?(before)}
    assert {:ok, "right"} = ask(head, "reply:right", retry: true)
  end

  describe "an engine over two nodes" do
    test "is loaded once both are there, and tells the other how to meet it", context do
      %{head: head, other: other} = context
      told = Path.join(System.tmp_dir!(), "told-#{System.unique_integer([:positive])}")
      on_exit(fn -> File.rm(told) end)
      start(head, other, model: "ready;rank;told:#{told}", seed: 7)
      assert :ok = await(head)
      assert {:ok, "right"} = ask(head, "reply:right")
      assert eventually(fn -> File.exists?(told) and File.read!(told) =~ "}" end)

      options =
        for [_, name, value] <- Regex.scan(~r/"(\w+)": ([^,}]+)/, File.read!(told)),
            into: %{},
            do: {name, value}

      assert %{"nnodes" => "2", "node_rank" => "1", "master_addr" => ~s("127.0.0.1")} = options
      assert %{"tensor_parallel_size" => "2", "seed" => "7"} = options
      assert String.to_integer(options["master_port"]) in 20_000..32_000
      assert String.to_integer(options["data_parallel_rpc_port"]) in 20_000..32_000
      assert [_one] = guards(other)
      assert :ok = Peers.call(head, VLLM, :stop, [Split])
      assert guards(other) == []
    end

    test "ends everywhere and begins anew when the rank of the other node dies", context do
      start(context.head, context.other, model: "litter;ready;rank;litter")
      ends_and_begins_anew(context, :rank)
    end

    @tag :slow
    test "ends everywhere and begins anew whatever part of it dies, or the link", context do
      start(context.head, context.other, model: "litter;ready;rank;litter")

      for victim <- [:rank_guard, :head, :head_guard, :link],
          do: ends_and_begins_anew(context, victim)
    end

    test "is refused by what one of them says", %{head: head, other: other} do
      start(head, other, model: "hang;rank;refuse:model_not_found")
      assert {:error, %Error{reason: :model_not_found} = error} = await(head)
      assert error.message =~ "On the node #{other.node}: "
      assert {processes(head), processes(other)} == {[], []}
    end

    for {variable, words} <- [
          FAKE_VLLM: "has vllm 1, and this one 0",
          FAKE_CHECKPOINT: "model's files on the node"
        ] do
      test "is refused where #{variable} differs", %{head: head, other: other} do
        Peers.call(other, System, :put_env, [unquote("#{variable}"), "1"])
        on_exit(fn -> Peers.call(other, System, :delete_env, [unquote("#{variable}")]) end)
        start(head, other, model: "hang")
        assert {:error, %Error{reason: :node_incompatible} = error} = await(head)
        assert error.message =~ unquote(words)
        assert eventually(fn -> {processes(head), processes(other)} == {[], []} end)
      end
    end

    test "waits for a node that is not there", %{head: head} do
      start(head, %{node: :"nobody@127.0.0.1"}, load_timeout: 300)
      assert {:error, %Error{reason: :node_down} = error} = await(head)
      assert error.details["nodes"] == ["nobody@127.0.0.1"]
      assert processes(head) == []
    end

    @tag :slow
    test "waits for one that has not started its applications yet", %{head: head, other: other} do
      :ok = Peers.call(other, Application, :stop, [:ex_vllm])
      start(head, other, [])

      assert {:error, %Error{reason: :timeout}} =
               Peers.call(head, VLLM, :await_ready, [Split, 500])

      {:ok, _} = Peers.call(other, Application, :ensure_all_started, [:ex_vllm])
      assert :ok = await(head)
      assert {:ok, "right"} = ask(head, "reply:right")
    end
  end

  test "nothing is left of it on a node whose BEAM is killed, nor on the other" do
    [head, other] = Peers.start([:one, :two])
    start(head, other, model: "litter;ready;rank;litter", max_seconds: 1)
    assert :ok = await(head)
    held = hold(head)
    before = processes(head) ++ processes(other)
    assert Peers.kill(other)
    assert {:error, %Error{reason: :node_down}} = Task.await(held, 30_000)
    assert gone?(before)

    # Without it there is no start, and another can take its place.
    [third] = Peers.start([:third], beside: head)
    assert :ok = Peers.call(head, VLLM, :stop, [Split])
    start(head, third, model: "litter;ready;rank;litter")
    assert :ok = await(head)
    before = processes(head) ++ processes(third)
    assert length(before) > 8
    assert Peers.kill(head)
    assert gone?(before)
    assert guards(third) == []
  end

  test "nodes: begins with the engine's own, and knows which part is whose" do
    new = &Config.new([model: "m"] ++ &1)

    assert {:error, %Error{reason: :invalid_option, message: message}} =
             new.(nodes: [:gpu1@a, :gpu2@b])

    assert message =~ "first of `nodes` is gpu1@a, and this node is nonode@nohost"
    assert message =~ "--name"
    assert {:ok, _config} = new.(nodes: [node(), :gpu2@b], master_port: 29_600)

    for options <- [[nodes: [node(), node()]], [nodes: []], [nodes: node()], [nodes: ["a@b"]]] do
      assert {:error, %Error{reason: :invalid_option, details: %{"option" => "nodes"}}} =
               new.(options)
    end

    for {name, value} <- [nnodes: 2, node_rank: 1] do
      assert {:error, %Error{details: %{"option" => option}}} =
               new.([{name, value}, {:nodes, [node(), :gpu2@b]}])

      assert option == Atom.to_string(name)
    end
  end
end
