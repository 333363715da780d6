defmodule VLLM.TestTest do
  # What applications' tests get from engines that answer from a script.
  use ExUnit.Case, async: true
  doctest VLLM.Test

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{ChatMessage, CompletionOutput, Delta, Error, FakeEngine, ToolCall}
  alias VLLM.Test.Request

  defp start!(script, options \\ []), do: VLLM.Test.start!([script: script] ++ options)

  describe "scripts" do
    test "a reply answers every request" do
      llm = start!("Paris")
      assert VLLM.text(VLLM.generate!(llm, ["a", "b"])) == ["Paris", "Paris"]
    end

    test "a list of replies is used up in order, by all workers together" do
      llm = start!(["1", {:text, "2"}, fn request -> request.prompt end], replicas: 2)
      assert Enum.map(~w(a b c), &FakeEngine.ask(llm, &1)) == [{:ok, "1"}, {:ok, "2"}, {:ok, "c"}]

      assert {:error, %Error{reason: :unsupported, message: message}} = FakeEngine.ask(llm, "d")
      assert message == "The script has no reply to \"d\"."
    end

    test "a map answers by prompt, and a conversation by its last message" do
      llm = start!(%{"France" => "Paris", "Japan" => "Tokyo"})
      assert VLLM.text(VLLM.generate!(llm, ["Japan", "France"])) == ["Tokyo", "Paris"]

      messages = [%{role: "system", content: "Be brief."}, %{role: "user", content: "Japan"}]
      assert VLLM.text(VLLM.chat!(llm, messages)) == ["Tokyo"]
      assert {:error, %Error{reason: :unsupported}} = VLLM.generate(llm, "Peru")
    end

    test "a function sees the request and may wait without holding up others" do
      test = self()

      llm =
        start!(fn
          %Request{prompt: "slow"} ->
            send(test, {:asked, self()})
            receive do: (:answer -> "late")

          %Request{method: method, sampling_params: params} ->
            "#{method} #{params["max_tokens"]}"
        end)

      FakeEngine.ask_in_background(llm, "slow")
      assert_receive {:asked, waiting}
      assert FakeEngine.ask(llm, "quick", max_tokens: 5) == {:ok, "generate 5"}
      send(waiting, :answer)
      assert_receive {:answer, {:ok, "late"}}
    end

    test "a function that raises, and a reply that is none, are told" do
      llm = start!(%{"raise" => fn _ -> raise "no idea" end, "none" => {:texd, "x"}})
      assert {:error, %Error{reason: :internal, message: message}} = FakeEngine.ask(llm, "raise")
      assert message == "The script failed: ** (RuntimeError) no idea"
      assert {:error, %Error{reason: :internal, message: message}} = FakeEngine.ask(llm, "none")
      assert message =~ "no reply: {:texd, \"x\"}"
    end

    test "a reply that the wire cannot carry is told" do
      llm = start!(%Error{reason: :timeout, message: "Late.", details: %{"by" => self()}})
      assert {:error, %Error{reason: :internal, message: message}} = FakeEngine.ask(llm, "x")
      assert message =~ "cannot be sent"
    end
  end

  describe "replies" do
    test "an output has all that a real one has" do
      [output] = VLLM.generate!(start!("née"), "Hi", n: 2)
      assert %{finished: true, prompt: "Hi", prompt_token_ids: [72, 105]} = output

      assert [%CompletionOutput{index: 0} = first, %CompletionOutput{index: 1, text: "née"}] =
               output.outputs

      assert %{text: "née", token_ids: [110, 233, 101], finish_reason: "stop"} = first
    end

    test "a completion says how it ended" do
      llm = start!(%CompletionOutput{text: "Par", finish_reason: "length"})
      assert [%{outputs: [%{text: "Par", finish_reason: "length"}]}] = VLLM.generate!(llm, "x")
      assert [%Delta{text: "Par", finish_reason: "length"}] = Enum.to_list(VLLM.stream!(llm, "x"))
    end

    test "a completion says what a schema makes of it" do
      llm = start!(%CompletionOutput{text: ~s({"city": "Paris"}), parsed: %{"city" => "Paris"}})
      schema = %{type: "object", properties: %{city: %{type: "string"}}}
      assert [%{outputs: [completion]}] = VLLM.generate!(llm, "x", schema: schema)
      assert completion.parsed == %{"city" => "Paris"}
      assert [%{sampling_params: %{"structured_outputs" => _}}] = VLLM.Test.requests(llm)
    end

    test "a message calls tools, and the conversation goes on" do
      call = %ToolCall{
        id: "1",
        name: "get_weather",
        arguments: ~s({"city": "Paris"}),
        parsed: %{"city" => "Paris"}
      }

      llm = start!([%ChatMessage{tool_calls: [call]}, "It rains."])
      messages = [%{role: "user", content: "Will it rain in Paris?"}]
      tools = [%{type: "function", function: %{name: "get_weather"}}]

      [%{outputs: [%{message: message}]}] = VLLM.chat!(llm, messages, tools: tools)
      assert %ChatMessage{role: "assistant", content: nil, tool_calls: [^call]} = message

      messages = messages ++ [message, %{role: "tool", tool_call_id: "1", content: "rain"}]
      [%{outputs: [%{message: message}]}] = VLLM.chat!(llm, messages)
      assert message == %ChatMessage{role: "assistant", content: "It rains."}

      assert [first, second] = VLLM.Test.requests(llm)
      assert [%{"function" => %{"name" => "get_weather"}}] = first.params["tools"]
      assert Enum.map(second.messages, & &1["role"]) == ["user", "assistant", "tool"]
    end

    test "numbers are vectors, classes and scores" do
      llm = start!({:numbers, [0.25, 0.75]}, labels: ["no", "yes"])
      assert [embedding] = VLLM.embed!(llm, "x")
      assert VLLM.Embedding.to_list(embedding) == [0.25, 0.75]
      assert [%{label: "yes", probs: [0.25, 0.75]}] = VLLM.classify!(llm, "x")
      assert Enum.map(VLLM.score!(llm, "q", ["a", "b"]), & &1.score) == [0.25, 0.75]
      assert Enum.map(VLLM.rerank!(llm, "q", ["a", "b"]), & &1.index) == [1, 0]

      assert {:error, %Error{reason: :unsupported, message: message}} = VLLM.generate(llm, "x")
      assert message =~ "numbers for a request that wants none"
      assert {:error, %Error{reason: :unsupported}} = VLLM.embed(start!("Paris"), "x")
    end

    test "errors arrive as they are written" do
      error = %Error{reason: :prompt_too_long, message: "Too long.", details: %{"tokens" => 9}}
      llm = start!([error, {:error, :overloaded, "Later."}, {:error, :nonsense, "?"}])
      assert {:error, told} = VLLM.generate(llm, "x")
      assert told == %{error | details: %{"tokens" => 9, "prompt_index" => 0}}
      assert {:error, %Error{reason: :overloaded, message: "Later."}} = VLLM.generate(llm, "x")
      assert {:error, %Error{message: message}} = VLLM.generate(llm, "x")
      assert message =~ ":nonsense is no reason of a VLLM.Error"
    end

    test "a delay holds up nobody else" do
      llm =
        start!(%{"soon" => {:delay, 20, "late"}, "never" => {:delay, 600_000, "never"}},
          shutdown_timeout: 100
        )

      FakeEngine.ask_in_background(llm, "never")
      await_requests(llm, 1)
      started = System.monotonic_time(:millisecond)
      assert FakeEngine.ask(llm, "soon") == {:ok, "late"}
      assert System.monotonic_time(:millisecond) - started >= 20
      VLLM.stop(llm)
      assert_receive {:answer, {:error, %Error{reason: :shutdown}}}
    end

    test "each beam of a search says the same" do
      llm = start!("yes")
      assert [output] = VLLM.beam_search!(llm, "x", beam_width: 3, max_tokens: 4)
      assert Enum.map(output.sequences, & &1.text) == ["yes", "yes", "yes"]
      assert {output.prompt, hd(output.sequences).tokens} == {"x", ~c"yes"}
      assert [%{method: "beam_search", prompt: "x"}] = VLLM.Test.requests(llm)
    end

    test "an answer that never comes ends at the deadline" do
      llm = start!(:hang)
      assert {:error, %Error{reason: :timeout}} = VLLM.generate(llm, "x", timeout: 20)
      await_idle(llm)
    end

    test "a worker that dies takes what is in flight with it and comes back" do
      llm = start!(%{"die" => :die, "hang" => :hang, "well" => "yes"})
      FakeEngine.ask_in_background(llm, "hang")
      await_requests(llm, 1)
      assert {:error, %Error{reason: :engine_dead}} = FakeEngine.ask(llm, "die")
      assert_receive {:answer, {:error, %Error{reason: :engine_dead}}}
      assert FakeEngine.ask(llm, "well") == {:ok, "yes"}
      assert Enum.map(VLLM.Test.requests(llm), & &1.prompt) == ["hang", "die", "well"]
    end

    test "a worker that dies too often is given up" do
      llm = start!(:die, max_restarts: 0)
      assert {:error, %Error{reason: :engine_dead}} = FakeEngine.ask(llm, "x")
      assert {:error, %Error{reason: :failed}} = FakeEngine.ask(llm, "x")
    end
  end

  describe "streams" do
    test "give the deltas as they are written, then the whole" do
      llm = start!({:deltas, ["Par", {:delay, 1, "is"}, "."]})

      assert [%Delta{text: "Par", finish_reason: nil}, %Delta{text: "is"}, last] =
               Enum.to_list(VLLM.stream!(llm, "x"))

      assert %Delta{text: ".", token_ids: [46], finish_reason: "stop"} = last

      ref = VLLM.stream_to(llm, "x")
      for text <- ["Par", "is", "."], do: assert_receive({:vllm, ^ref, %Delta{text: ^text}})
      assert_receive {:vllm, ^ref, {:done, output}}
      assert VLLM.text(output) == "Paris."
      assert VLLM.text(VLLM.generate!(llm, "x")) == ["Paris."]
    end

    test "of conversations tell what they add to the message" do
      call = %ToolCall{id: "1", name: "f", arguments: "{}", parsed: %{}}
      message = %ChatMessage{role: "assistant", reasoning: "Hm.", tool_calls: [call]}
      llm = start!([{:deltas, ["Par", "is"]}, message])
      messages = [%{role: "user", content: "x"}]

      assert Enum.map(VLLM.chat_stream!(llm, messages), & &1.message.content) == ["Par", "is"]

      ref = VLLM.chat_stream_to(llm, messages)
      assert_receive {:vllm, ^ref, %Delta{finish_reason: "stop", message: delta}}
      assert %{content: "", reasoning: "Hm.", tool_calls: [added]} = delta
      assert %{index: 0, id: "1", name: "f", arguments: "{}"} = added
      assert_receive {:vllm, ^ref, {:done, %{outputs: [%{message: ^message}]}}}
    end

    test "each of n completions comes and ends" do
      deltas = Enum.to_list(VLLM.stream!(start!({:deltas, ["a", "b"]}), "x", n: 2))

      assert Enum.map(deltas, &{&1.index, &1.text, &1.finish_reason}) ==
               [{0, "a", nil}, {1, "a", nil}, {0, "b", "stop"}, {1, "b", "stop"}]
    end

    test "break off with an error, or with the worker" do
      llm = start!([{:deltas, ["Par", {:error, :aborted, "No."}]}, {:deltas, ["Par", :die]}])

      for reason <- [:aborted, :engine_dead] do
        assert [{:ok, %Delta{text: "Par", finish_reason: nil}}, {:error, error}] =
                 Enum.to_list(VLLM.stream(llm, "x"))

        assert error.reason == reason
      end
    end

    test "longer than what may be on the way are whole" do
      words = for number <- 1..500, do: "#{number} "
      assert Enum.to_list(VLLM.stream_text!(start!({:deltas, words}), "x")) == words
    end

    test "left early, and cancelled, leave nothing behind" do
      llm = start!({:deltas, ["a", "b", :hang]})
      assert Enum.take(VLLM.stream_text!(llm, "x"), 2) == ["a", "b"]
      ref = VLLM.stream_to(llm, "x")
      assert_receive {:vllm, ^ref, %Delta{text: "b"}}
      VLLM.cancel(ref)
      await_idle(llm)
    end
  end

  describe "the engine" do
    test "is part of a supervision tree, by its name" do
      start_supervised!(
        {VLLM.Test, name: VLLM.TestTest.Named, script: "Paris", max_model_len: 99}
      )

      assert :ok = VLLM.await_ready(VLLM.TestTest.Named)
      assert VLLM.text(VLLM.generate!(VLLM.TestTest.Named, "x")) == ["Paris"]
      assert %{max_model_len: 99, device: "script"} = VLLM.engine_info!(VLLM.TestTest.Named)

      assert {:error, %Error{reason: :invalid_option}} =
               VLLM.Test.start(name: VLLM.TestTest.Named)

      :ok = VLLM.stop(VLLM.TestTest.Named)
      # The registry hears of the end a moment later.
      assert eventually(fn ->
               match?(
                 {:error, %Error{reason: :not_running}},
                 VLLM.tokenize(VLLM.TestTest.Named, "x")
               )
             end)

      assert_raise Error, ~r/no engine/, fn -> VLLM.Test.requests(VLLM.TestTest.Named) end
    end

    test "is like a real one beside its work" do
      llm = start!("Paris", name: {:global, VLLM.TestTest.Global})
      assert VLLM.tokenize!(llm, "née") == [110, 233, 101]
      assert VLLM.detokenize!(llm, [110, 233, 101]) == "née"
      assert {:error, %Error{reason: :invalid_option}} = VLLM.detokenize(llm, [0xD800])
      assert VLLM.apply_chat_template!(llm, [%{role: "user", content: "Hi"}]).prompt == "user: Hi"
      assert VLLM.health(llm) == :ok
      assert VLLM.sleep(llm) == :ok
      assert VLLM.wake_up(llm) == :ok
      assert VLLM.reset_prefix_cache(llm) == :ok
      assert {:ok, %{"num_requests_running" => 0}} = VLLM.metrics(llm)
      # What a server that starts asks of it.
      assert VLLM.OpenAI.Models.prepare(%{name: nil, engine: llm, settings: %{}}) == :ok
      assert VLLM.Test.requests(llm) == []
    end

    test "keeps adapters by their names" do
      llm = start!(fn request -> request.params["lora_request"]["lora_name"] end)
      sql = VLLM.lora_request!("sql", "/adapters/sql")
      assert VLLM.load_lora(llm, sql) == :ok
      assert VLLM.list_loras(llm) == {:ok, [sql]}
      assert VLLM.text(VLLM.generate!(llm, "x", lora_request: sql)) == ["sql"]
      assert VLLM.unload_lora(llm, "sql") == :ok
      assert VLLM.list_loras(llm) == {:ok, []}
      assert {:error, %Error{reason: :model_not_found}} = VLLM.unload_lora(llm, "sql")
    end

    test "notes prompts of token ids, streams and texts to score" do
      llm = start!(fn request -> if request.method == "score", do: {:numbers, [1]}, else: "x" end)
      VLLM.generate!(llm, %{prompt_token_ids: [1, 2]})
      Stream.run(VLLM.stream!(llm, "s", max_tokens: 3))
      VLLM.score!(llm, "q", "d")

      assert [
               %Request{prompt: nil, prompt_token_ids: [1, 2], stream?: false},
               %Request{prompt: "s", sampling_params: %{"max_tokens" => 3}, stream?: true},
               %Request{method: "score", params: %{"data_1" => ["q"], "data_2" => ["d"]}}
             ] = VLLM.Test.requests(llm)
    end

    test "sheds load" do
      llm = start!(:hang, max_in_flight: 1, max_queue: 1, shutdown_timeout: 100)
      for _ <- 1..2, do: FakeEngine.ask_in_background(llm, "x")
      await_requests(llm, 2)
      assert {:error, %Error{reason: :overloaded}} = FakeEngine.ask(llm, "x")
      VLLM.stop(llm)
      for _ <- 1..2, do: assert_receive({:answer, {:error, %Error{reason: :shutdown}}})
    end

    test "frees the place of a caller that dies" do
      llm = start!(:hang)
      caller = FakeEngine.ask_in_background(llm, "x")
      await_requests(llm, 1)
      Process.exit(caller, :kill)
      await_idle(llm)
    end

    test "starts no program of the system, and ends with its owner" do
      test = self()

      owner =
        spawn(fn ->
          send(test, {:llm, start!(:hang)})
          receive do: (:end -> :ok)
        end)

      assert_receive {:llm, llm}
      [{worker, program}] = FakeEngine.workers(llm)
      assert is_pid(program.port)
      refute File.exists?(program.run_dir)

      monitors = for pid <- [worker, program.port], do: Process.monitor(pid)
      send(owner, :end)
      for monitor <- monitors, do: assert_receive({:DOWN, ^monitor, :process, _, _})
    end
  end

  defp await_requests(llm, count),
    do: assert(eventually(fn -> length(VLLM.Test.requests(llm)) == count end))

  defp await_idle(llm), do: assert(eventually(fn -> FakeEngine.in_flight(llm) == 0 end))
end
