defmodule VLLM.FramesTest do
  # Frames that no worker should send, from one that does, through the real guard
  # and port: its requests end with an error, it is ended with a reason and comes
  # back, and neither the VM nor other engines notice. test/vllm/bridge/fuzz_test.exs
  # has many more of them without a process; python/tests/test_worker.py has those
  # that no Elixir should send.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.Bridge.MessagePack
  alias VLLM.Error

  setup do
    # Another engine, with a request in flight that is answered at the end.
    other = start!()
    ask_in_background(other, "hold")
    await_held(other, 1)

    %{llm: start!("ready", max_restarts: 1000, max_seconds: 1), other: other}
  end

  defp hex(frame), do: frame |> IO.iodata_to_binary() |> Base.encode16(case: :lower)
  defp encoded(term), do: term |> MessagePack.encode!() |> hex()

  defp assert_unharmed(%{llm: llm, other: other}) do
    assert eventually(fn -> ask(llm, "reply:again") == {:ok, "again"} end)
    assert {:ok, "released"} = ask(other, "release")
    assert_receive {:answer, {:ok, "released"}}
    refute_received _
  end

  describe "a worker is ended with a reason, which everyone in flight gets, when it sends" do
    for {what, payload, reason} <- [
          {"nothing at all", "", "the data ends"},
          {"a byte that starts nothing", "c1", "193"},
          {"a request", "9400ffa5", "the data ends"},
          {"a request that is whole", "940007a568656c6c6f80", "neither a response"},
          {"a notification with a list", "9302a46e6f7465" <> "90", "neither a response"},
          {"a notification with a timestamp", "9302a46e6f7465d6ff00000000", "neither a response"},
          {"a response without an id", "9401c0c0c0", "without an id"},
          {"a response with a negative id", "9401ffc0c0", "without an id"},
          {"arrays in arrays", String.duplicate("91", 1000), "512 deep"},
          {"a map that announces 4 Gi pairs", "9302a46e6f7465dfffffffff", "the data ends"},
          {"deltas without ids", "9302a664656c74617381a664656c74617391" <> "c0", "a delta"},
          {"deltas in no columns", "9302ad7061636b65645f64656c74617380", "a delta"},
          {"deltas of nobody's making", "9302a664656c74617381a664656c746173" <> "9190", "a delta"}
        ] do
      # Each costs a restart.
      if what not in ["arrays in arrays", "a request that is whole"], do: @tag(:slow)

      test what, %{llm: llm} = context do
        ask_in_background(llm, "hold")
        await_held(llm, 1)
        result = ask(llm, "frame:" <> unquote(payload))
        assert {:error, %Error{reason: :protocol, message: message}} = result
        assert message =~ unquote(reason)
        assert_receive {:answer, {:error, %Error{reason: :protocol}}}
        assert_unharmed(context)
      end
    end
  end

  describe "the answer that makes no sense ends its request with a reason:" do
    for {what, body} <- [
          {"one with bytes after it", "c0c000"},
          {"one that is cut", "c0"},
          {"nil", "c0c0"},
          {"a number", "c007"},
          {"an empty map", "c080"},
          {"a list", "c090"},
          {"outputs that are none", "c0" <> "81a76f75747075747393c0c0c0"}
        ] do
      if what not in ["an empty map"], do: @tag(:slow)

      test what, %{llm: llm} = context do
        assert {:error, %Error{reason: :protocol, message: message}} =
                 ask(llm, "frame:9401ID" <> unquote(body))

        assert message =~ "malformed"
        assert_unharmed(context)
      end
    end

    test "logprobs whose columns are not of a length", %{llm: llm} = context do
      logprobs = %{
        "counts" => MessagePack.bin(<<2::32-little>>),
        "token_ids" => MessagePack.bin(<<1::32-little>>),
        "logprobs" => MessagePack.bin(<<0.5::32-float-little>>),
        "ranks" => MessagePack.bin(<<1::32-little>>),
        "tokens" => ["a"]
      }

      bin = MessagePack.bin("")
      completion = %{"token_ids" => bin, "logprobs" => logprobs, "text" => "x"}
      output = encoded(%{"prompt_token_ids" => bin, "outputs" => [completion]})
      assert {:error, %Error{reason: :protocol}} = ask(llm, "frame:9401IDc0" <> output)
      assert_unharmed(context)
    end

    @tag :slow
    test "an error that is none", %{llm: llm} = context do
      assert {:error, %Error{reason: :protocol}} = ask(llm, "frame:9401ID07c0")
      assert_unharmed(context)
    end

    test "a delta that is none", %{llm: llm} = context do
      # Its logprobs have no columns: {}.
      deltas = "frame:9302a664656c74617381a664656c7461739197ID00a161c40080c0c0;hold"

      assert [{:error, %Error{reason: :protocol, message: message}}] =
               Enum.to_list(VLLM.stream(llm, deltas))

      assert message =~ "a delta that is none"
      assert_unharmed(context)
    end
  end

  describe "nobody notices" do
    test "a notification that nobody knows", %{llm: llm} = context do
      note = encoded([2, "no_such_method", %{"x" => 1}])
      assert {:ok, "fine"} = ask(llm, "frame:#{note};reply:fine")
      assert_unharmed(context)
    end

    test "known notifications about nothing", %{llm: llm} = context do
      notes = [
        [2, "deltas", %{}],
        [2, "deltas", %{"deltas" => []}],
        [2, "deltas", %{"deltas" => [[2 ** 40, 0, "a", "", nil, nil, nil]]}],
        [
          2,
          "packed_deltas",
          %{
            "ids" => MessagePack.bin(<<2 ** 40::64-little>>),
            "counts" => MessagePack.bin(<<0::32>>),
            "token_ids" => MessagePack.bin(""),
            "texts" => ["a"]
          }
        ],
        [2, "load_progress", %{"phase" => 7}],
        [2, "load_progress", %{}],
        [2, "load_progress", %{"phase" => "download", "bytes" => "many"}]
      ]

      steps = Enum.map_join(notes, ";", &("frame:" <> encoded(&1)))
      assert {:ok, "fine"} = ask(llm, steps <> ";reply:fine")
      assert_unharmed(context)
    end

    test "answers to ids that were never used, are over or come twice", %{llm: llm} = context do
      assert {:ok, "first"} = ask(llm, "reply:first")
      old = for id <- 0..3, do: "frame:" <> encoded([1, id, nil, %{"late" => id}])
      assert {:ok, "mine"} = ask(llm, Enum.join(old ++ ["unknown:mine"], ";"))
      assert {:ok, "twice"} = ask(llm, "duplicate:twice")
      assert_unharmed(context)
    end
  end
end
