defmodule VLLM.Bridge.ConnectionTest do
  use ExUnit.Case, async: true

  alias VLLM.Bridge.{Connection, Inbox, MessagePack}
  alias VLLM.Error

  defp frame(message), do: IO.iodata_to_binary(MessagePack.encode!(message))

  test "a response keeps its body as bytes, which its caller decodes" do
    assert {:response, 7, body} = Connection.parse(frame([1, 7, nil, %{"text" => "hi"}]))
    assert Connection.decode_response(body) == {:ok, %{"text" => "hi"}}
  end

  test "a response may carry an error" do
    error = %{"reason" => "timeout", "message" => "Late.", "details" => %{}}
    assert {:response, 300, body} = Connection.parse(frame([1, 300, error, nil]))
    assert {:error, %Error{reason: :timeout, message: "Late."}} = Connection.decode_response(body)
  end

  test "a notification is decoded" do
    assert {:notification, "load_progress", %{"phase" => "config"}} =
             Connection.parse(frame([2, "load_progress", %{"phase" => "config"}]))
  end

  test "whatever else comes is malformed, with a reason in words" do
    for message <- [
          [0, 1, "hello", %{}],
          [2, 1, %{}],
          [2, "x", []],
          %{},
          7,
          [],
          [1, "x", nil, nil]
        ] do
      assert {:malformed, reason} = Connection.parse(frame(message))
      assert is_binary(reason)
    end

    assert {:malformed, _} = Connection.parse("")
    assert {:malformed, _} = Connection.parse(<<0xC1>>)
    assert {:malformed, _} = Connection.parse(<<0x94, 0x01>>)
    assert {:error, {:malformed, _}} = Connection.decode_response(<<0xC0>>)
    assert {:error, {:malformed, _}} = Connection.decode_response(<<0xC0, 0xC0, 0xC0>>)
  end

  test "random bytes and random frames are never more than malformed" do
    for _ <- 1..20_000 do
      bytes = :rand.bytes(:rand.uniform(40))

      for frame <- [bytes, <<0x94, 0x01, bytes::binary>>, <<0x93, 0x02, bytes::binary>>] do
        case Connection.parse(frame) do
          {:response, id, body} when is_integer(id) ->
            assert elem(Connection.decode_response(body), 0) in [:ok, :error]

          {:notification, method, params} ->
            assert is_binary(method) and is_map(params)

          {:malformed, reason} ->
            assert is_binary(reason)
        end
      end
    end
  end

  test "the protocol guide's examples are what both sides say" do
    examples =
      Regex.scan(
        ~r/^\| `((?:[0-9a-f]{2} ?)+)` \| `(.+)` \|$/m,
        File.read!("guides/protocol.md"),
        capture: :all_but_first
      )

    assert length(examples) >= 3

    for [hex, says] <- examples do
      bytes = Base.decode16!(String.replace(hex, " ", ""), case: :lower)
      # The right column is Elixir but for the braces of its maps.
      {message, []} =
        Code.eval_string(says |> String.replace("{", "%{") |> String.replace("\":", "\" =>"))

      assert MessagePack.decode(bytes) == {:ok, message}
      assert frame(message) == bytes
    end
  end

  test "a connection is sealed only while nothing is under way, and then takes nothing" do
    conn = Connection.new(self(), 1_000)
    assert {:ok, %{id: id}} = Connection.request(conn, Inbox.new(), "generate", %{})
    refute Connection.seal(conn)
    assert Connection.in_flight(conn) == 1
    assert Connection.deliver(conn, id, {:error, Error.new(:aborted, "Over.")})
    assert Connection.seal(conn)

    assert {:error, %Error{reason: :engine_dead}} =
             Connection.request(conn, Inbox.new(), "generate", %{}, 10)

    assert {:error, %Error{reason: :engine_dead}} =
             Connection.request(conn, Inbox.new(), "generate", %{})

    assert Connection.in_flight(conn) == 0
    assert Connection.seal(conn)
  end

  describe "deltas in columns" do
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
        "ids" => for({id, _, _} <- deltas, into: <<>>, do: <<id::64-little>>),
        "counts" => for({_, _, ids} <- deltas, into: <<>>, do: <<length(ids)::32-little>>),
        "token_ids" => for({_, _, ids} <- deltas, id <- ids, into: <<>>, do: <<id::32-little>>),
        "texts" => for({_, text, _} <- deltas, do: text)
      }
    end

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
      assert {:ok, steps} = Connection.deliver_packed(context.conn, params, %{})
      assert told(one) == {"a", [1]}
      assert told(two) == {"b", [2, 3]}

      params = columns([{one.id, "c", []}, {gone, "?", [7]}, {two.id, "d", [4]}])
      assert {:ok, ^steps} = Connection.deliver_packed(context.conn, params, steps)
      assert told(one) == {"c", []}
      assert told(two) == {"d", [4]}

      # Whoever has left his stream hears nothing more of it.
      Connection.finish(one.request)
      assert {:ok, ^steps} = Connection.deliver_packed(context.conn, params, steps)
      assert told(one) == nil
      assert told(two) == {"d", [4]}

      params = columns([{two.id, "e", [5]}, {two.id, "f", [6]}])
      assert {:ok, %{} = steps} = Connection.deliver_packed(context.conn, params, steps)
      assert map_size(steps) == 2
      assert [told(two), told(two), told(two)] == [{"e", [5]}, {"f", [6]}, nil]
    end

    test "of ever other streams are not all kept in mind", context do
      one = stream(context)

      steps =
        for n <- 1..1000, reduce: %{} do
          steps ->
            params = columns([{one.id, "a", [1]}, {2 ** 40 + n, "b", [2]}])
            {:ok, steps} = Connection.deliver_packed(context.conn, params, steps)
            steps
        end

      assert map_size(steps) <= 8
    end

    test "are malformed where the columns do not fit together", context do
      one = stream(context)
      good = columns([{one.id, "a", [1]}])
      assert {:ok, _} = Connection.deliver_packed(context.conn, good, %{})

      for {name, value} <- [
            {"ids", <<one.id::32-little>>},
            {"ids", <<one.id::64-little, one.id::64-little>>},
            {"ids", <<>>},
            {"ids", [one.id]},
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
          ] do
        params = Map.put(good, name, value)

        assert {:malformed, "a delta of another shape"} =
                 Connection.deliver_packed(context.conn, params, %{})
      end

      assert {:malformed, _} = Connection.deliver_packed(context.conn, %{}, %{})
      once = stream(context, :once)

      assert {:malformed, "a delta of a request that is no stream"} =
               Connection.deliver_packed(context.conn, columns([{once.id, "a", [1]}]), %{})
    end
  end

  describe "who is refused is told when to try again" do
    setup do
      owner = self()
      # Requests of the owner itself are not counted.
      conn = Connection.new(owner, 1_000)
      {:ok, client} = Agent.start_link(fn -> nil end)

      request = fn limit ->
        Agent.get(client, fn _ -> Connection.request(conn, Inbox.new(), "x", %{}, limit) end)
      end

      finish = fn %{id: id} ->
        assert Connection.deliver(conn, id, {:response, <<0xC0, 0xC0>>})
      end

      %{request: request, finish: finish}
    end

    defp advised({:error, %Error{reason: :overloaded, details: details}}),
      do: details["retry_after_ms"]

    test "a second while nothing has ended", %{request: request} do
      {:ok, _} = request.(1)
      assert advised(request.(1)) == 1000
      assert advised(request.(1)) == 1000
    end

    test "as long as a request takes, and those who were refused before", context do
      %{request: request, finish: finish} = context
      asked = System.monotonic_time(:millisecond)

      for _ <- 1..20 do
        {:ok, sent} = request.(1)
        Process.sleep(10)
        finish.(sent)
      end

      # What is idle between two requests does not count.
      Process.sleep(300)
      {:ok, _} = request.(1)
      first = advised(request.(1))
      longest = (System.monotonic_time(:millisecond) - asked - 300) / 20 + 1
      assert first >= 10 and first <= longest
      for _ <- 1..8, do: request.(1)
      assert advised(request.(1)) >= 10 * first
    end
  end
end
