defmodule VLLM.LinksTest do
  # Calls over a link that is late, lossy, slow and cut: a sample of bench/namespaces.exs, which has the whole.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 2]

  alias VLLM.{Error, FakeEngine, LLM, Network, Peers}

  @moduletag :slow
  @moduletag skip: if(not Network.possible?(), do: "network namespaces are for root")

  @patience 60_000

  # In seconds: after at most a quarter more, what says nothing is given up.
  @ticktime 4

  setup_all do
    network = Network.start_link(2)
    peers = Peers.start([:engine, :caller], network: network, kernel: [net_ticktime: @ticktime])
    [e, c] = peers
    # No more than a reader may be behind.
    words = for n <- 1..100, do: "#{n} "
    slowly = for word <- words, do: {:delay, 5, word}
    script = %{"words" => {:deltas, slowly}, "hang" => :hang, "begun" => {:deltas, ["a", :hang]}}
    Peers.serve(e, VLLM.Test, name: Scripted, script: script)
    %{network: network, e: e, c: c, there: {Scripted, e.node}, words: Enum.join(words)}
  end

  test "a bad link loses, crosses and leaves nothing",
       %{network: network, e: e, c: c} = context do
    Network.link(network, 1, delay: 0.05, loss: 0.05, rate: 125_000)
    assert read(context) == context.words
    late = [context.there, "hang", [timeout: 300]]
    assert {:error, %Error{reason: :timeout}} = Peers.call(c, VLLM, :generate, late)
    stream = VLLM.stream(context.there, "begun", timeout: @patience)
    assert [{:ok, %{text: "a"}}] = Peers.call(c, Enum, :take, [stream, 1])
    assert in_flight?(e, 0)
    Network.link(network, 1)
  end

  test "a cut ends what is under way, and a short one nothing", %{e: e, c: c} = context do
    %{network: network, there: there} = context
    true = Peers.call(c, Node, :connect, [e.node])
    reading = Task.async(fn -> read(context) end)
    assert in_flight?(e, 1)
    Network.link(network, 2, up: 0)
    # All is sent, and the rest of it lost at first.
    assert in_flight?(e, 0)
    Network.link(network, 2)
    assert Task.await(reading, @patience) == context.words

    calls =
      for options <- [[timeout: :infinity], [timeout: 1_000]] do
        Task.async(fn -> Peers.call(c, VLLM, :generate, [there, "hang", options]) end)
      end

    assert in_flight?(e, 2)
    Network.link(network, 2, up: 0)
    assert [{:error, lost}, {:error, late}] = Task.await_many(calls, @patience)
    assert {lost.reason, late.reason} == {:node_down, :timeout}
    assert in_flight?(e, 0)
    Network.link(network, 2)
    assert read(context) == context.words
  end

  defp read(%{c: c, there: there}),
    do: Peers.call(c, Enum, :join, [VLLM.stream_text!(there, "words", timeout: @patience)])

  defp in_flight?(e, count) do
    here = %LLM{id: Scripted, model: "", node: e.node}
    eventually(fn -> Peers.call(e, FakeEngine, :in_flight, [here]) == count end, @patience)
  end
end
