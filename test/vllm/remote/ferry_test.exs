defmodule VLLM.Remote.FerryTest do
  # A ferry to this very node, which is all the same to it.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.Bridge.Inbox
  alias VLLM.Remote.Ferry

  # A stream whose caller and whose proxy are the calling process.
  defp stream(method \\ "generate") do
    {:ok, courier} = Agent.start_link(fn -> nil end)
    caller = Inbox.open(Inbox.new(), courier, :many)
    {:relay, ferry, number} = relay = Ferry.take(caller)
    proxy = Inbox.open(Inbox.new(), ferry, :many)
    worker = spawn(fn -> receive do: ({:say, what} -> Enum.each(what, &send(ferry, &1))) end)
    send(ferry, {:relay, number, proxy, worker, method})
    %{caller: caller, proxy: proxy, relay: relay, ferry: ferry, number: number, worker: worker}
  end

  defp columns(streams, text) do
    numbers = for %{number: number} <- streams, into: <<>>, do: <<number::64-little>>
    counts = for _ <- streams, into: <<>>, do: <<1::32-little>>
    {:columns, numbers, counts, counts, List.duplicate(text, length(streams))}
  end

  defp row(%{number: number}, text), do: [number, 0, text, "", nil, nil, nil]

  # What has come to an address, up to a last message.
  defp received({inbox, ref} = address, last) do
    receive do
      {^inbox, ^ref, ^last} -> [last]
      {^inbox, ^ref, message} -> [message | received(address, last)]
    after
      5_000 -> flunk("#{inspect(last)} has not come")
    end
  end

  test "takes deltas to the caller and what the proxy has to know to that, each in its order" do
    %{ferry: ferry, relay: relay} = one = stream()

    for message <- [columns([one], "a"), {:rows, [row(one, "b")]}, columns([one], "c")],
        do: send(ferry, message)

    send(ferry, {:last, one.number, :over})
    assert [{:delta, _, _}, :over] = received(one.proxy, :over)
    Ferry.answer(relay, {:answer, :done})

    assert received(one.caller, {:answer, :done}) == [
             {:delta, "a", [1]},
             {:delta, [0, "b", "", nil, nil, nil]},
             {:delta, "c", [1]},
             {:answer, :done}
           ]
  end

  test "brings what a step has for many streams in one message" do
    [%{ferry: ferry} | _] = streams = for _ <- 1..100, do: stream()
    %{pier: pier} = :sys.get_state(ferry)
    :erlang.trace(ferry, true, [:send])
    rows = {:rows, for(stream <- streams, do: row(stream, "b"))}
    columns = columns(streams, "a")
    for message <- [columns, rows], do: send(ferry, message)

    for stream <- streams,
        do:
          assert(
            [{:delta, "a", [1]} | _] = received(stream.caller, {:delta, tl(row(stream, "b"))})
          )

    :erlang.trace(ferry, false, [:send])
    # Or in two, if the second came later.
    assert Enum.reject(sent(ferry, pier), &(elem(&1, 0) == :open)) == [columns, rows]
  end

  defp sent(ferry, pier) do
    receive do: ({:trace, ^ferry, :send, load, ^pier} -> load ++ sent(ferry, pier)),
            after: (0 -> [])
  end

  test "leaves it to the proxy what is wrong with a delta that is none" do
    %{ferry: ferry} = one = stream()
    none = [0, "b", "", %{}, nil, nil]
    send(ferry, {:rows, [[one.number | none], row(one, "c")]})
    assert [{:delta, ^none}, {:delta, _}] = received(one.proxy, {:delta, tl(row(one, "c"))})
    assert [_] = received(one.caller, {:delta, tl(row(one, "c"))})

    %{ferry: ferry} = over_http = stream("http_request")
    send(ferry, {:rows, [row(over_http, "d"), [over_http.number, "a piece"]]})
    assert [{:delta, _}, _] = received(over_http.proxy, {:delta, ["a piece"]})
    assert [_] = received(over_http.caller, {:delta, ["a piece"]})
  end

  test "tells the proxy that the worker has ended, behind what it has said" do
    one = stream()
    send(one.worker, {:say, [columns([one], "a"), columns([one], "b")]})
    assert [{:delta, _, _}, {:down, :normal}] = received(one.proxy, {:down, :normal})
  end

  # As a process of its own, which says what it was given.
  defp proxy do
    test = self()

    pid =
      spawn(fn ->
        {:relay, _ferry, _number} = relay = Ferry.take({make_ref(), make_ref()})
        send(test, {self(), relay})
        Process.sleep(:infinity)
      end)

    receive do: ({^pid, {:relay, ferry, number}} -> {pid, ferry, number})
  end

  test "forgets a stream with its proxy" do
    {proxy, ferry, number} = proxy()
    assert is_map_key(:sys.get_state(ferry).streams, number)
    Process.exit(proxy, :kill)
    assert eventually(fn -> not is_map_key(:sys.get_state(ferry).streams, number) end)
    assert eventually(fn -> not is_map_key(:sys.get_state(ferry).numbers, proxy) end)
  end

  test "ends with its pier, its proxies with it, and another one takes the next" do
    {proxy, ferry, _number} = proxy()
    monitor = Process.monitor(proxy)
    Process.exit(:sys.get_state(ferry).pier, :kill)
    assert_receive {:DOWN, ^monitor, :process, _, {:shutdown, :killed}}, 5_000
    assert %{ferry: another} = stream()
    assert another != ferry
  end
end
