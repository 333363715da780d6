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
