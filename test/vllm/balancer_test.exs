defmodule VLLM.BalancerTest do
  # Which of several replicas a request goes to.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine

  alias VLLM.Bridge.{Connection, MessagePack}
  alias VLLM.Engine.{Balancer, Call, Table}

  @call Call.new(%{timeout: :infinity})

  describe "what belongs together" do
    test "are prompts that begin alike, as text or as tokens" do
      system = String.duplicate("You are helpful. ", 10)
      assert key(%{"prompt" => system <> "a"}) == key(%{"prompt" => system <> "b"})
      refute key(%{"prompt" => "a"}) == key(%{"prompt" => "b"})

      tokens = fn ids ->
        {:ok, [prompt]} = VLLM.Prompt.to_wire(%{prompt_token_ids: ids})
        key(%{"prompt" => prompt})
      end

      assert tokens.(Enum.to_list(1..40)) == tokens.(Enum.to_list(1..50))
      refute tokens.(Enum.to_list(1..40)) == tokens.(Enum.to_list(2..40))
    end

    test "are prompts with the same image" do
      prompt = fn image ->
        given = %{prompt: "What is it?", multi_modal_data: %{image: {:binary, image}}}
        {:ok, [prompt]} = VLLM.Prompt.to_wire(given)
        key(%{"prompt" => prompt})
      end

      assert prompt.("one") == prompt.("one")
      refute prompt.("one") == prompt.("two")
    end

    test "are the turns of a conversation" do
      chat = fn messages ->
        {:ok, :one, [conversation]} = VLLM.Conversation.to_wire(messages)
        key(%{"messages" => conversation})
      end

      first = [%{role: "system", content: "Be brief."}, %{role: "user", content: "Hello!"}]
      more = [%{role: "assistant", content: "Hi."}, %{role: "user", content: "Who are you?"}]
      assert chat.(first) == chat.(first ++ more)
      refute chat.(first) == chat.([hd(first), %{role: "user", content: "Good day!"}])
    end

    test "are the requests of a session, whatever they say" do
      session = %{@call | session: {:user, 7}}

      assert Balancer.key(%{"prompt" => "a"}, session) ==
               Balancer.key(%{"prompt" => "b"}, session)

      other = %{@call | session: {:user, 8}}
      refute Balancer.key(%{"prompt" => "a"}, session) == Balancer.key(%{"prompt" => "a"}, other)
    end

    test "is nothing where no prompt is" do
      assert key(%{"text" => "to be tokenized"}) == nil
    end

    test "does not take long to find out" do
      long = %{"prompt" => String.duplicate("x", 50_000_000)}
      bytes = MessagePack.bin(List.duplicate("x", 1_000_000))
      {microseconds, _} = :timer.tc(fn -> for _ <- 1..100, do: key(long) end)
      # To read all of it a hundred times would take several seconds.
      assert microseconds < 2_000_000
      assert is_integer(key(%{"prompt" => %{"prompt_token_ids" => bytes}}))
    end
  end

  describe "the choice" do
    test "is the same for the same key, and spreads keys over all workers" do
      workers = workers_with([0, 0, 0, 0])
      chosen = for n <- 1..400, do: choose(workers, n)
      assert chosen == for(n <- 1..400, do: choose(workers, n))
      counts = chosen |> Enum.frequencies() |> Map.values()
      assert length(counts) == 4 and Enum.min(counts) > 50
    end

    test "changes only for what a worker that goes had, or one that comes gets" do
      workers = workers_with([0, 0, 0, 0])
      before = for n <- 1..400, do: {n, choose(workers, n)}

      for {n, index} <- before do
        left = Enum.reject(workers, fn {_load, worker} -> worker.index == 2 end)
        if index != 2, do: assert(choose(left, n) == index)
      end

      more = workers ++ [{0, %{index: 5, window: 100}}]
      for {n, index} <- before, do: assert(choose(more, n) in [index, 5])
    end

    test "is the least busy one where the right one is busier than the others, or full" do
      [key] = Enum.take(for(n <- 1..100, choose(workers_with([0, 0]), n) == 1, do: n), 1)
      assert choose(workers_with([1, 0]), key) == 1
      assert choose(workers_with([2, 0]), key) == 1
      assert choose(workers_with([3, 0]), key) == 2
      assert choose(workers_with([40, 30]), key) == 1
      assert choose(workers_with([60, 30]), key) == 2
      # There is a queue at the one, and none at the other.
      assert choose(workers_with([100, 99]), key) == 2
    end

    test "is the one at home unless it is busier than the others, and then as without one" do
      key = Enum.find(1..100, &(choose(workers_with([0, 0, 0]), &1) == 2))
      assert reported(workers_with([1, 0, 0]), key, 1) == 1
      assert reported(workers_with([40, 35, 30]), key, 1) == 1
      assert reported(workers_with([60, 50, 20]), key, 1) == 2
      assert reported(workers_with([62, 20]), key, 1) == 2
      assert reported(workers_with([9, 0, 0]), key, :elsewhere) == 2
    end

    test "counts what each computes at once" do
      small = {10, %{index: 1, window: 16}}
      large = {30, %{index: 2, window: 256}}
      assert Balancer.choose([small, large], %{}, @call).index == 2
      assert Balancer.choose([{1, elem(small, 1)}, large], %{}, @call).index == 1
    end

    test "is the least busy one for what belongs nowhere" do
      assert Balancer.choose(workers_with([2, 1, 3]), %{}, @call).index == 2
    end

    test "is of a cluster's engines the less busy of any two for what belongs nowhere" do
      engines = workers_with([2, 1, 3, 0])
      drawn = for _ <- 1..300, do: Balancer.choose_reported(engines, %{}, @call, nil).index
      # Never the busiest of all, and not the least busy one alone.
      assert drawn |> Enum.uniq() |> Enum.sort() == [1, 2, 4]
      assert Enum.count(drawn, &(&1 == 4)) in 100..200
      two = [{1, %{index: 1, window: 16}}, {30, %{index: 2, window: 256}}]
      for _ <- 1..20, do: assert(Balancer.choose_reported(two, %{}, @call, nil).index == 1)
    end

    test "is always the same stand-in, or the less busy of two, where the right one is busy" do
      idle = [0, 0, 0, 0, 0, 0]
      busy = fn index, load -> List.replace_at(idle, index - 1, load) end

      stand_ins =
        for key <- 1..60 do
          right = choose(workers_with(idle), key)

          [stand_in] =
            Enum.uniq(for _ <- 1..10, do: reported(workers_with(busy.(right, 30)), key))

          assert stand_in != right

          # Where that has something to do, one other.
          loads = List.replace_at(busy.(right, 30), stand_in - 1, 2)
          [other] = Enum.uniq(for _ <- 1..10, do: reported(workers_with(loads), key))
          assert other not in [right, stand_in]

          # Where both are busy, whichever is drawn.
          loads = List.replace_at(List.replace_at(loads, stand_in - 1, 30), other - 1, 30)
          drawn = for _ <- 1..40, do: reported(workers_with(loads), key)
          assert length(Enum.uniq(drawn)) > 1
          stand_in
        end

      assert stand_ins |> Enum.uniq() |> Enum.sort() == [1, 2, 3, 4, 5, 6]
    end
  end

  @tag :slow
  test "prompts stay with their replica while it is there, and come back to it" do
    llm = start!("ready", replicas: 3)
    ask! = fn session -> with {:ok, pid} <- ask(llm, "pid", session: session), do: pid end
    sessions = Enum.to_list(1..30)
    before = Map.new(sessions, &{&1, ask!.(&1)})
    assert before == Map.new(sessions, &{&1, ask!.(&1)})
    assert before |> Map.values() |> Enum.uniq() |> length() == 3

    # One replica dies; its sessions move, the others stay.
    victim = before[1]
    {:error, _} = ask(llm, "kill", session: 1)
    moved = Map.new(sessions, &{&1, ask!.(&1)})

    for session <- sessions do
      if before[session] == victim,
        do: refute(moved[session] == victim),
        else: assert(moved[session] == before[session])
    end

    # It is back, with another pid, and has its sessions again.
    assert VLLM.OSProcess.eventually(fn ->
             length(Table.workers(table(llm))) == 3
           end)

    again = Map.new(sessions, &{&1, ask!.(&1)})
    mine = for session <- sessions, before[session] == victim, do: again[session]
    assert [_one] = Enum.uniq(mine)
    others = for session <- sessions, before[session] != victim, do: session
    assert Map.take(again, others) == Map.take(before, others)
  end

  @tag :slow
  test "no replica gets more than its share of one session" do
    llm = start!("ready", replicas: 2, max_in_flight: 100)
    for _ <- 1..40, do: ask_in_background(llm, "hold", session: :popular)
    assert VLLM.OSProcess.eventually(fn -> in_flight(llm) == 40 end)
    loads = for worker <- Table.workers(table(llm)), do: Connection.in_flight(worker.conn)
    assert Enum.max(loads) <= 1.25 * 20 + 2
  end

  defp key(params), do: Balancer.key(params, @call)

  defp choose(workers, key),
    do: Balancer.choose(workers, %{"prompt" => "x"}, %{@call | session: key}).index

  defp reported(engines, key, home \\ nil) do
    Balancer.choose_reported(engines, %{"prompt" => "x"}, %{@call | session: key}, home).index
  end

  defp workers_with(loads) do
    for {load, index} <- Enum.with_index(loads, 1), do: {load, %{index: index, window: 100}}
  end

  defp table(llm) do
    {:ok, table, _pid} = Table.lookup(llm)
    table
  end
end
