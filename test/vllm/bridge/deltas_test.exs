defmodule VLLM.Bridge.DeltasTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.{Connection, Deltas, Inbox}

  setup do
    conn = Connection.new(self(), 1_000)
    {:ok, owner} = Agent.start_link(fn -> nil end)
    %{conn: conn, owner: owner}
  end

  # A stream whose messages come here; the owner of the port is another process.
  defp stream(%{conn: conn, owner: owner}, answers \\ :many) do
    inbox = Inbox.new()
    request = Connection.request(%{conn | owner: owner}, inbox, "x", %{}, :infinity, answers)
    {:ok, %{id: id, address: {_inbox, ref}} = request} = request
    %{id: id, inbox: inbox, ref: ref, request: request}
  end

  defp columns(deltas) do
    %{
      "ids" => numbers(for {id, _, _} <- deltas, do: id),
      "counts" => for({_, _, ids} <- deltas, into: <<>>, do: <<length(ids)::32-little>>),
      "token_ids" => for({_, _, ids} <- deltas, id <- ids, into: <<>>, do: <<id::32-little>>),
      "texts" => for({_, text, _} <- deltas, do: text)
    }
  end

  # What fits to nothing else of the columns of one delta with one token.
  defp malformed(id) do
    [
      {"ids", <<id::32-little>>},
      {"ids", <<id::64-little, id::64-little>>},
      {"ids", <<>>},
      {"ids", [id]},
      {"counts", <<>>},
      {"counts", <<0::32-little>>},
      {"counts", <<2::32-little>>},
      {"counts", <<0xFFFFFFFF::32-little>>},
      {"counts", nil},
      {"token_ids", <<1>>},
      {"token_ids", <<1::32-little, 2::32-little>>},
      {"token_ids", [1]},
      {"texts", []},
      {"texts", ["a", "b"]},
      {"texts", [1]},
      {"texts", "a"},
      {"texts", nil}
    ]
  end

  defp numbers(numbers), do: for(number <- numbers, into: <<>>, do: <<number::64-little>>)

  describe "deltas in columns" do
    defp told(%{inbox: inbox, ref: ref}) do
      receive do
        {^inbox, ^ref, {:delta, text, ids}} -> {text, VLLM.Delta.of_text(text, ids).token_ids}
      after
        0 -> nil
      end
    end

    test "come to their streams, in order, also of ids that came before", context do
      [one, two] = [stream(context), stream(context)]
      gone = 2 ** 62

      params = columns([{one.id, "a", [1]}, {gone, "?", [7]}, {two.id, "b", [2, 3]}])
      assert {:ok, steps} = Deltas.columns(context.conn, params, %{})
      assert told(one) == {"a", [1]}
      assert told(two) == {"b", [2, 3]}

      params = columns([{one.id, "c", []}, {gone, "?", [7]}, {two.id, "d", [4]}])
      assert {:ok, ^steps} = Deltas.columns(context.conn, params, steps)
      assert told(one) == {"c", []}
      assert told(two) == {"d", [4]}

      # Whoever has left his stream hears nothing more of it.
      Connection.finish(one.request)
      assert {:ok, ^steps} = Deltas.columns(context.conn, params, steps)
      assert told(one) == nil
      assert told(two) == {"d", [4]}

      params = columns([{two.id, "e", [5]}, {two.id, "f", [6]}])
      assert {:ok, %{} = steps} = Deltas.columns(context.conn, params, steps)
      assert map_size(steps) == 2
      assert [told(two), told(two), told(two)] == [{"e", [5]}, {"f", [6]}, nil]
    end

    test "of ever other streams are not all kept in mind", context do
      one = stream(context)

      steps =
        for n <- 1..1000, reduce: %{} do
          steps ->
            params = columns([{one.id, "a", [1]}, {2 ** 40 + n, "b", [2]}])
            {:ok, steps} = Deltas.columns(context.conn, params, steps)
            steps
        end

      assert map_size(steps) <= 8
    end

    test "are malformed where the columns do not fit together", context do
      one = stream(context)
      good = columns([{one.id, "a", [1]}])
      assert {:ok, _} = Deltas.columns(context.conn, good, %{})

      for {name, value} <- malformed(one.id) do
        params = Map.put(good, name, value)

        assert {:malformed, "a delta of another shape"} =
                 Deltas.columns(context.conn, params, %{})
      end

      assert {:malformed, _} = Deltas.columns(context.conn, %{}, %{})
      once = stream(context, :once)

      assert {:malformed, "a delta of a request that is no stream"} =
               Deltas.columns(context.conn, columns([{once.id, "a", [1]}]), %{})
    end
  end

  describe "a relay" do
    # Its name is in what comes from it.
    defp relay(name) do
      test = self()
      {:ok, pid} = Task.start_link(fn -> pass_on(name, test) end)
      &{:relay, pid, &1}
    end

    defp pass_on(name, to) do
      receive do: (message -> send(to, {name, message}))
      pass_on(name, to)
    end

    test "hears of its streams, and gets everything for them", context do
      relay = relay(:a)
      one = stream(context, relay.(7))
      address = one.request.address
      owner = context.owner
      assert_receive {:a, {:relay, 7, ^address, ^owner, "x"}}

      params = columns([{one.id, "a", [1]}])
      assert {:ok, _} = Deltas.columns(context.conn, params, %{})
      assert_receive {:a, {:columns, <<7::64-little>>, <<1::32-little>>, <<1::32-little>>, ["a"]}}

      assert Connection.deliver(context.conn, one.id, {:response, "body"})
      assert_receive {:a, {:last, 7, {:response, "body"}}}
      assert told(one) == nil
    end

    test "gets the columns of a step as they are where all are its own", context do
      relay = relay(:a)
      [one, two] = [stream(context, relay.(3)), stream(context, relay.(4))]
      params = columns([{two.id, "b", [1, 2]}, {one.id, "a", []}])
      assert {:ok, steps} = Deltas.columns(context.conn, params, %{})
      assert {:ok, ^steps} = Deltas.columns(context.conn, params, steps)
      numbers = numbers([4, 3])
      %{"counts" => counts, "token_ids" => token_ids, "texts" => texts} = params
      for _ <- 1..2, do: assert_receive({:a, {:columns, ^numbers, ^counts, ^token_ids, ^texts}})
    end

    test "gets its own of a step with others", context do
      [a, b] = [relay(:a), relay(:b)]
      here = stream(context)
      [one, two, other] = for answers <- [a.(1), a.(2), b.(1)], do: stream(context, answers)

      params =
        columns([
          {one.id, "1", [11]},
          {here.id, "h", [5, 6]},
          {other.id, "o", []},
          {2 ** 62, "?", [9]},
          {two.id, "2", [21, 22]}
        ])

      assert {:ok, _} = Deltas.columns(context.conn, params, %{})
      assert told(here) == {"h", [5, 6]}

      for {relay, share} <- [a: [{1, "1", [11]}, {2, "2", [21, 22]}], b: [{1, "o", []}]] do
        %{"ids" => ids, "counts" => counts, "token_ids" => token_ids} = columns(share)
        texts = for {_, text, _} <- share, do: text
        assert_receive {^relay, {:columns, ^ids, ^counts, ^token_ids, ^texts}}
      end
    end

    test "gets the rows of a step together", context do
      [a, b] = [relay(:a), relay(:b)]
      here = stream(context)
      [one, other] = [stream(context, a.(1)), stream(context, b.(2))]
      row = &[&1, 0, &2, "", nil, nil, nil]

      assert :ok =
               Deltas.rows(context.conn, [
                 row.(one.id, "x"),
                 row.(other.id, "y"),
                 row.(here.id, "h"),
                 [one.id, "a piece"],
                 row.(one.id, "z")
               ])

      assert_receive {:a, {:rows, [[1, 0, "x" | _], [1, "a piece"], [1, 0, "z" | _]]}}
      assert_receive {:b, {:rows, [[2, 0, "y" | _]]}}
      %{inbox: inbox, ref: ref} = here
      assert_receive {^inbox, ^ref, {:delta, [0, "h", "", nil, nil, nil]}}
    end

    test "gets nothing of columns that do not fit together", context do
      relay = relay(:a)
      one = stream(context, relay.(1))
      address = one.request.address
      assert_receive {:a, {:relay, 1, ^address, _, _}}
      good = columns([{one.id, "a", [1]}])
      both = numbers([one.id, stream(context).id])

      for {name, value} <- malformed(one.id) do
        params = Map.put(good, name, value)
        assert {:malformed, _} = Deltas.columns(context.conn, params, %{})
        # With another stream, of which there is nothing else.
        with_other = Map.put(params, "ids", both)
        assert {:malformed, _} = Deltas.columns(context.conn, with_other, %{})
      end

      send(elem(relay.(1), 1), :last)
      assert_receive {:a, :last}
      refute_received {:a, _}
    end
  end
end
