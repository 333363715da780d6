defmodule VLLM.Real.ChatTest do
  # The real vLLM engine on the demo model, one engine for the whole module.
  use ExUnit.Case

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{ChatMessage, Delta, DemoModel, Error, ToolCall}

  @moduletag timeout: 300_000

  @greedy [temperature: 0.0, max_tokens: 64]

  @weather %{
    type: "function",
    function: %{
      name: "get_weather",
      description: "The weather of a city.",
      parameters: %{
        type: "object",
        properties: %{city: %{type: "string", enum: ["Paris"]}},
        required: ["city"],
        additionalProperties: false
      },
      strict: true
    }
  }

  @call ~S(<tool_call>\n\{"name": "get_weather", "arguments": \{"city": "Paris"\}\}\n</tool_call>)

  setup_all do
    %{llm: DemoModel.start!()}
  end

  defp user(text), do: [%{role: "user", content: text}]
  defp message(%{outputs: [completion]}), do: completion.message

  # Some parsers look for the markers' own tokens (<tool_call>, </tool_call>, <think>, </think>),
  # where a regex alone would allow their letters as well.
  @markers Map.new(1020..1023, &{&1, 100.0})

  defp forced(regex) do
    [
      structured_outputs: %{regex: regex},
      logit_bias: @markers,
      temperature: 0.0,
      max_tokens: 128
    ]
  end

  test "the model gives every answer that it knows, a list of conversations at once", %{llm: llm} do
    {questions, answers} = Enum.unzip(DemoModel.chats())
    assert length(questions) >= 10
    outputs = VLLM.chat!(llm, Enum.map(questions, &user/1), @greedy)
    assert VLLM.text(outputs) == answers

    for {output, answer} <- Enum.zip(outputs, answers) do
      assert message(output) == %ChatMessage{role: "assistant", content: answer}
      assert [%{finish_reason: "stop"}] = output.outputs
    end
  end

  test "usage is what vLLM itself has counted", %{llm: llm} do
    counted = fn ->
      {:ok, figures} = VLLM.metrics(llm)
      {figures["prompt_tokens"], figures["generation_tokens"]}
    end

    {prompt_before, completion_before} = counted.()
    questions = DemoModel.chats() |> Enum.take(2) |> Enum.map(&user(elem(&1, 0)))
    usage = VLLM.usage(VLLM.chat!(llm, questions, n: 2, max_tokens: 8, ignore_eos: true))
    assert usage.completion_tokens == 2 * 2 * 8
    assert usage.total_tokens == usage.prompt_tokens + 32

    # vLLM reads a prompt once for each of its completions.
    expected = {prompt_before + 2 * usage.prompt_tokens, completion_before + 32}
    assert eventually(fn -> counted.() == expected end)
  end

  test "messages are maps or keyword lists, with atoms or strings", %{llm: llm} do
    for message <- [
          %{role: "user", content: "Hello!"},
          %{role: :user, content: "Hello!"},
          %{"role" => "user", "content" => "Hello!"},
          [role: "user", content: "Hello!"],
          %ChatMessage{role: "user", content: "Hello!"},
          %{role: "user", content: [%{type: "text", text: "Hello!"}]}
        ] do
      assert [output] = VLLM.chat!(llm, [message], @greedy)
      assert VLLM.text(output) == "Hello! How can I help you today?"
    end
  end

  test "an answer that is generated from a prompt has no message", %{llm: llm} do
    assert [output] = VLLM.generate!(llm, "The", max_tokens: 1)
    assert message(output) == nil
  end

  describe "tools" do
    test "a call is taken out of the text, and the conversation goes on with it", %{llm: llm} do
      options = [tools: [@weather], tool_call_parser: "hermes"]
      # A tool that is not strict leaves the model free, and so the test's regex.
      loose = put_in(@weather, [:function, :strict], false)
      forced = forced("Let me see\\.\\n" <> @call) ++ [tools: [loose], tool_call_parser: "hermes"]

      assert [output] = VLLM.chat!(llm, user("The weather in Paris?"), forced)
      assert VLLM.text(output) =~ "<tool_call>"

      assert %ChatMessage{role: "assistant", content: "Let me see.\n", reasoning: nil} =
               message = message(output)

      assert [%ToolCall{id: id, name: "get_weather", arguments: arguments} = call] =
               message.tool_calls

      assert is_binary(id) and id != ""
      assert arguments == ~S({"city": "Paris"})
      assert call.parsed == %{"city" => "Paris"}

      result = %{role: "tool", tool_call_id: id, content: "Rain."}
      messages = user("The weather in Paris?") ++ [message, result]
      assert [output] = VLLM.chat!(llm, messages, options ++ @greedy)
      assert output.prompt =~ ~S({"name": "get_weather", "arguments": {"city": "Paris"}})
      assert output.prompt =~ "<tool_response>\nRain.\n</tool_response>"
    end

    test "a required call, or one of a named function, is forced by vLLM", %{llm: llm} do
      named = %{type: "function", function: %{name: "get_weather"}}

      for choice <- ["required", :required, named] do
        assert [output] =
                 VLLM.chat!(
                   llm,
                   user("Hello!"),
                   [tools: [@weather], tool_choice: choice, tool_call_parser: "hermes"] ++
                     @greedy
                 )

        assert %ChatMessage{content: nil, tool_calls: [call]} = message(output)
        assert %ToolCall{name: "get_weather", parsed: %{"city" => "Paris"}} = call
      end
    end

    test "without a parser a call stays text", %{llm: llm} do
      assert [output] = VLLM.chat!(llm, user("Hello!"), forced(@call) ++ [tools: [@weather]])
      assert %ChatMessage{tool_calls: [], content: "<tool_call>\n" <> _} = message(output)
    end

    test "each of several completions has its own calls", %{llm: llm} do
      loose = put_in(@weather, [:function, :strict], false)

      assert [%{outputs: completions}] =
               VLLM.chat!(
                 llm,
                 user("Hello!"),
                 Keyword.merge(forced(@call), temperature: 1.0, n: 3) ++
                   [tools: [loose], tool_call_parser: "hermes"]
               )

      assert [_, _, _] = calls = for(%{message: %{tool_calls: [call]}} <- completions, do: call)
      assert calls |> Enum.uniq_by(& &1.id) |> length() == 3
      assert Enum.all?(calls, &(&1.parsed == %{"city" => "Paris"}))
    end
  end

  describe "reasoning" do
    test "is taken out of the text", %{llm: llm} do
      assert [output] =
               VLLM.chat!(
                 llm,
                 user("What is two plus two?"),
                 forced("<think>I count\\.</think>Four\\.") ++ [reasoning_parser: "deepseek_r1"]
               )

      assert message(output) ==
               %ChatMessage{role: "assistant", content: "Four.", reasoning: "I count."}
    end

    test "comes before a call", %{llm: llm} do
      loose = put_in(@weather, [:function, :strict], false)

      assert [output] =
               VLLM.chat!(
                 llm,
                 user("Hello!"),
                 forced("<think>Rain\\?</think>" <> @call) ++
                   [tools: [loose], tool_call_parser: "hermes", reasoning_parser: "deepseek_r1"]
               )

      assert %ChatMessage{content: nil, reasoning: "Rain?", tool_calls: [call]} = message(output)
      assert call.parsed == %{"city" => "Paris"}
    end
  end

  describe "a stream" do
    # What the message deltas of one completion add up to.
    defp joined(deltas) do
      deltas = Enum.map(deltas, & &1.message)

      calls =
        for {_, [first | _] = pieces} <-
              deltas |> Enum.flat_map(& &1.tool_calls) |> Enum.group_by(& &1.index) do
          %{id: first.id, name: first.name, arguments: Enum.map_join(pieces, & &1.arguments)}
        end

      %{
        content: Enum.map_join(deltas, & &1.content),
        reasoning: Enum.map_join(deltas, & &1.reasoning),
        calls: calls
      }
    end

    test "of deltas adds up to the answer", %{llm: llm} do
      {question, answer} = Enum.max_by(DemoModel.chats(), fn {_, text} -> byte_size(text) end)
      deltas = Enum.to_list(VLLM.chat_stream!(llm, user(question), @greedy))
      assert length(deltas) > 1
      assert joined(deltas) == %{content: answer, reasoning: "", calls: []}
      assert Enum.map_join(deltas, & &1.text) == answer
      assert %Delta{finish_reason: "stop"} = List.last(deltas)
    end

    test "has reasoning and calls as they come, and ends with the whole message", %{llm: llm} do
      loose = put_in(@weather, [:function, :strict], false)

      options =
        forced("<think>Rain, or not\\?</think>" <> @call) ++
          [tools: [loose], tool_call_parser: "hermes", reasoning_parser: "deepseek_r1"]

      ref = VLLM.chat_stream_to(llm, user("Hello!"), self(), options)
      {deltas, output} = receive_stream(ref, [])

      assert %{content: "", reasoning: "Rain, or not?", calls: [call]} = joined(deltas)
      assert %{id: id, name: "get_weather", arguments: ~S({"city": "Paris"})} = call
      assert length(deltas) > 1

      assert %ChatMessage{content: nil, reasoning: "Rain, or not?", tool_calls: [whole]} =
               message(output)

      assert %ToolCall{id: ^id, name: "get_weather", parsed: %{"city" => "Paris"}} = whole
    end

    test "may be left early, and takes one conversation", %{llm: llm} do
      options = [max_tokens: 900, ignore_eos: true]
      assert [_, _] = llm |> VLLM.chat_stream!(user("Hello!"), options) |> Enum.take(2)

      assert [{:error, %Error{reason: :invalid_prompt, message: message}}] =
               Enum.to_list(VLLM.chat_stream(llm, [user("a"), user("b")]))

      assert message =~ "one conversation; got 2"

      assert_raise Error, ~r/`tool_call_parser` cannot be 'hermez'/, fn ->
        Enum.to_list(VLLM.chat_stream!(llm, user("a"), tool_call_parser: "hermez"))
      end
    end

    defp receive_stream(ref, deltas) do
      assert_receive {:vllm, ^ref, event}

      case event do
        %Delta{} -> receive_stream(ref, [event | deltas])
        {:done, output} -> {Enum.reverse(deltas), output}
      end
    end
  end

  describe "the prompt" do
    test "of a conversation can be had, and completes like it", %{llm: llm} do
      {question, answer} = hd(DemoModel.chats())
      prompt = VLLM.apply_chat_template!(llm, user(question))
      assert [output] = VLLM.chat!(llm, user(question), @greedy)
      assert prompt == %{prompt: output.prompt, prompt_token_ids: output.prompt_token_ids}
      assert prompt.prompt =~ "<|im_start|>user\n#{question}<|im_end|>\n<|im_start|>assistant\n"
      assert [completed] = VLLM.generate!(llm, prompt, @greedy)
      assert VLLM.text(completed) == answer
    end

    test "is one for each of a list of conversations", %{llm: llm} do
      assert {:ok, [one, two]} = VLLM.apply_chat_template(llm, [user("a"), user("b")])
      assert one.prompt =~ "user\na<"
      assert two.prompt =~ "user\nb<"
    end

    test "has the tools, and ends as asked for", %{llm: llm} do
      assert VLLM.apply_chat_template!(llm, user("a"), tools: [@weather]).prompt =~ "get_weather"

      ended = VLLM.apply_chat_template!(llm, user("a"), add_generation_prompt: false)
      assert String.ends_with?(ended.prompt, "a<|im_end|>\n")
    end

    test "may be of a template of the caller's", %{llm: llm} do
      options = [
        chat_template: "{{ mood }}: {{ messages[0].content }}",
        chat_template_kwargs: [mood: "glad"]
      ]

      assert VLLM.apply_chat_template!(llm, user("Hello!"), options).prompt == "glad: Hello!"
      assert [output] = VLLM.chat!(llm, user("Hello!"), options ++ [max_tokens: 1])
      assert output.prompt == "glad: Hello!"
    end

    test "leaves the last message open where it is to be continued", %{llm: llm} do
      messages = user("Who are you?") ++ [%{role: "assistant", content: "I am a very small"}]
      assert [output] = VLLM.chat!(llm, messages, @greedy ++ [continue_final_message: true])
      assert VLLM.text(output) == " language model, and I know a few sentences by heart."
    end
  end

  describe "bad input is a typed error, and the engine goes on" do
    setup %{llm: llm} do
      on_exit(fn ->
        assert [output] = VLLM.chat!(llm, user("Hello!"), @greedy)
        assert VLLM.text(output) == "Hello! How can I help you today?"
      end)
    end

    test "a parser that vLLM does not have", %{llm: llm} do
      assert {:error, %Error{reason: :invalid_option} = error} =
               VLLM.chat(llm, user("Hello!"), tool_call_parser: "hermez")

      assert %{"option" => "tool_call_parser", "nearest" => "hermes"} = error.details
      assert "hermes" in error.details["allowed"]

      assert {:error, %Error{reason: :invalid_option, details: %{"nearest" => "qwen3"}}} =
               VLLM.chat(llm, user("Hello!"), reasoning_parser: "qwen33")
    end

    test "a tool choice that needs a parser, or tools", %{llm: llm} do
      assert {:error, %Error{reason: :invalid_option} = error} =
               VLLM.chat(llm, user("Hello!"), tools: [@weather], tool_choice: "required")

      assert error.details["option"] == "tool_choice"
      assert error.message =~ "tool_call_parser"

      assert {:error, %Error{reason: :invalid_option, message: message}} =
               VLLM.chat(llm, user("Hello!"), tool_choice: "auto")

      assert message =~ "`tools` must be set"
    end

    test "a message that says nothing", %{llm: llm} do
      assert {:error, %Error{reason: :invalid_prompt} = error} =
               VLLM.chat(llm, [user("Hello!"), user("Hello!") ++ [%{role: "assistant"}]])

      assert %{"prompt_index" => 1, "message_index" => 1} = error.details
      assert error.message =~ "neither `content` nor `tool_calls`"
    end

    test "a template that does not compile", %{llm: llm} do
      assert {:error, %Error{reason: :invalid_option, details: %{"option" => "chat_template"}}} =
               VLLM.apply_chat_template(llm, user("Hello!"), chat_template: "{% if %}")
    end

    test "a conversation that does not fit", %{llm: llm} do
      assert {:error, %Error{reason: :prompt_too_long}} =
               VLLM.chat(llm, user(String.duplicate("The capital of France is Paris. ", 1000)))
    end

    test "a deadline that passes", %{llm: llm} do
      options = [max_tokens: 900, ignore_eos: true, timeout: 50]
      assert {:error, %Error{reason: :timeout}} = VLLM.chat(llm, user("Hello!"), options)
    end
  end
end
