defmodule VLLM.ConversationTest do
  use ExUnit.Case, async: true

  alias VLLM.{ChatMessage, Conversation, Error, ToolCall}

  @hello %{"role" => "user", "content" => "Hello!"}

  test "one conversation or a list of them, of maps or keyword lists" do
    for messages <- [
          [@hello],
          [%{role: "user", content: "Hello!"}],
          [%{role: :user, content: "Hello!"}],
          [[role: "user", content: "Hello!"]],
          [%ChatMessage{role: "user", content: "Hello!"}]
        ] do
      assert Conversation.to_wire(messages) == {:ok, :one, [[@hello]]}
      assert Conversation.to_wire([messages]) == {:ok, :many, [[@hello]]}
      assert Conversation.to_wire([messages, messages]) == {:ok, :many, [[@hello], [@hello]]}
    end
  end

  test "an answer is a message of the next turn, its calls as the template wants them" do
    message = %ChatMessage{
      role: "assistant",
      reasoning: "Rain?",
      tool_calls: [%ToolCall{id: "1", name: "f", arguments: "{}", parsed: %{}}]
    }

    assert Conversation.to_wire([message]) ==
             {:ok, :one,
              [
                [
                  %{
                    "role" => "assistant",
                    "content" => nil,
                    "reasoning" => "Rain?",
                    "tool_calls" => [
                      %{
                        "id" => "1",
                        "type" => "function",
                        "function" => %{"name" => "f", "arguments" => "{}"}
                      }
                    ]
                  }
                ]
              ]}
  end

  test "a message that cannot be sent says where, and not what is there" do
    message = %{role: "user", content: [[type: "text", text: "hi"], %{url: {"s3cret"}}]}

    assert {:error, %Error{reason: :invalid_prompt} = error} =
             Conversation.to_wire([@hello, message])

    assert error.message ==
             "Message 1 cannot be sent: it holds a tuple at `content[1].url`."
  end

  test "lists that end in something else are no conversations" do
    for messages <- [[@hello | :end], [[@hello | @hello]], [[@hello] | [@hello | :end]]] do
      assert {:error, %Error{reason: :invalid_prompt}} = Conversation.to_wire(messages)
    end
  end

  test "what is no conversation is refused with what one is" do
    for {messages, index} <- [
          {"Hello!", 0},
          {[], 0},
          {@hello, 0},
          {[role: "user", content: "Hello!"], 0},
          {[[@hello], []], 1}
        ] do
      assert {:error, %Error{reason: :invalid_prompt} = error} = Conversation.to_wire(messages)
      assert error.message =~ ~s(`[%{role: "user", content: "Hello!"}]`)
      assert error.details == %{"prompt_index" => index}
    end
  end

  test "what is no message is named" do
    for {message, words} <- [
          {"Hello!", "is not a map with `role` and `content`; got \"Hello!\""},
          {1..2, "is not a map"},
          {%{content: "x"}, "has no `role`"},
          {%{role: nil, content: "x"}, "has no `role`"},
          {%{role: "", content: "x"}, "has no `role`"},
          {%{role: 7, content: "x"}, "has no `role`"}
        ] do
      assert {:error, %Error{reason: :invalid_prompt} = error} =
               Conversation.to_wire([[@hello], [@hello, message]])

      assert error.message =~ "Message 1 #{words}"
      assert error.details == %{"prompt_index" => 1, "message_index" => 1}
    end
  end
end
