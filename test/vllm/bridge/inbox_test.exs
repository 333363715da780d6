defmodule VLLM.Bridge.InboxTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.Inbox

  defp agent, do: elem(Agent.start_link(fn -> nil end), 1)

  test "what is sent to an address comes with its reference, and to no other inbox" do
    other = Inbox.new()

    Inbox.run(fn inbox ->
      {_, ref} = address = Inbox.open(inbox, agent(), :many)
      Inbox.send(address, :first)
      Inbox.send(address, :second)
      assert Inbox.next(other, 0) == :timeout
      assert Inbox.next(inbox, 1_000) == {ref, :first}
      assert Inbox.next(inbox, 1_000) == {ref, :second}
      assert Inbox.next(inbox, 0) == :timeout
    end)
  end

  test "an address for one answer is closed by it, as is every one by close" do
    pid = agent()

    Inbox.run(fn inbox ->
      for owner <- [pid, self()] do
        once = Inbox.open(inbox, owner, :once)
        for answer <- [:first, :second], do: Inbox.send(once, answer)
        assert {_, :first} = Inbox.next(inbox, 1_000)
        assert Inbox.next(inbox, 0) == :timeout
      end

      for answers <- [:once, :many] do
        address = Inbox.open(inbox, pid, answers)
        :ok = Inbox.close(address)
        Inbox.send(address, :late)
        assert Inbox.next(inbox, 0) == :timeout
      end

      :ok = Agent.stop(pid)
      assert Inbox.next(inbox, 0) == :timeout
    end)
  end

  test "the end of a process comes to the inbox, also of one that has ended" do
    pid = agent()

    Inbox.run(fn inbox ->
      {_, ref} = Inbox.open(inbox, pid, :once)
      :ok = Agent.stop(pid)
      assert Inbox.next(inbox, 1_000) == {ref, {:down, :normal}}
      {_, ref} = Inbox.open(inbox, pid, :many)
      assert Inbox.next(inbox, 1_000) == {ref, {:down, :noproc}}
    end)
  end

  test "what is left is dropped at the end, but by a stream that was only suspended" do
    Inbox.run(fn inbox -> Inbox.send(Inbox.open(inbox, agent(), :many), :left) end)
    refute_received {_, _, :left}

    stream =
      Inbox.stream(fn inbox ->
        for text <- ["a", "b", "left"], do: Inbox.send(Inbox.open(inbox, agent(), :many), text)
        Stream.map(1..2, fn _ -> elem(Inbox.next(inbox, 0), 1) end)
      end)

    assert Enum.take(stream, 1) == ["a"]
    refute_received {_, _, "b"}
    # Zip suspends it after each element.
    assert stream |> Stream.zip([1, 2]) |> Enum.to_list() == [{"a", 1}, {"b", 2}]
    refute_received {_, _, "left"}
  end

  test "messages of others in the mailbox cost a call next to nothing" do
    deltas = for n <- 1..100, do: "#{n} "
    llm = VLLM.Test.start!(script: %{"x" => "y", "stream" => {:deltas, deltas}})
    prompts = List.duplicate("x", 100)
    for n <- 1..20_000, do: send(self(), {:foreign, n})

    for call <- [
          fn -> VLLM.generate!(llm, prompts) end,
          fn -> for prompt <- prompts, do: VLLM.generate!(llm, prompt) end,
          fn -> Stream.run(VLLM.generate_stream(llm, prompts)) end,
          fn -> Stream.run(VLLM.stream!(llm, "stream")) end
        ] do
      # To look at all of them for each prompt or delta takes two millions.
      assert reductions(call) < 1_000_000
    end
  end

  defp reductions(call) do
    {:reductions, before} = Process.info(self(), :reductions)
    call.()
    {:reductions, later} = Process.info(self(), :reductions)
    later - before
  end
end
