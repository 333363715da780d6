defmodule VLLM.Real.NodesTest do
  # A real engine over two nodes: two BEAMs on this machine. test/vllm/nodes_test.exs kills every part of
  # one, with the fake worker.
  use ExUnit.Case

  import VLLM.OSProcess

  alias VLLM.{DemoModel, Error, Peers, RealEngine}

  @moduletag :slow
  @moduletag timeout: 1_800_000

  test "says its sentences, and again after the rank of the other node was killed" do
    peers = [head, other] = Peers.start([:head, :other])

    # Both share the cores of this machine; and of what vLLM compiles this is no test.
    environment = %{
      "VLLM_CPU_OMP_THREADS_BIND" => "nobind",
      "OMP_NUM_THREADS" => "1",
      "TORCH_COMPILE_DISABLE" => "1"
    }

    for peer <- peers, do: Peers.call(peer, System, :put_env, [environment])

    options =
      Keyword.merge(DemoModel.options(),
        name: Split,
        model: DemoModel.path(),
        nodes: [head.node, other.node],
        tensor_parallel_size: 2
      )

    Peers.serve(head, VLLM, options, RealEngine.patience())
    assert Peers.call(head, DemoModel, :wrong_facts, [Split], RealEngine.patience()) == []

    before = Peers.processes(head) ++ Peers.processes(other)
    [rank] = for {:rank, pid} <- Peers.processes(other), do: pid
    count = [Split, "Count:", [max_tokens: 900, ignore_eos: true, temperature: 0.0]]
    lost = Task.async(fn -> Peers.call(head, VLLM, :generate, count, RealEngine.patience()) end)
    assert eventually(fn -> Peers.call(head, VLLM.FakeEngine, :in_flight, [Split]) == 1 end)
    assert signal("KILL", rank)
    assert {:error, %Error{reason: :engine_dead}} = Task.await(lost, RealEngine.patience())
    assert RealEngine.gone?(before)
    assert Peers.call(head, RealEngine, :right?, [Split, [retry: true]], RealEngine.patience())

    before = Peers.processes(head) ++ Peers.processes(other)
    assert Peers.kill(head)
    assert RealEngine.gone?(before)
  end
end
