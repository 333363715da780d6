# What the chat's page uses of Phoenix LiveView, in a few lines: the package is not here.
defmodule Phoenix.LiveView do
  @callback mount(map(), map(), map()) :: {:ok, map()}
  @callback render(map()) :: term()
  @callback handle_event(String.t(), map(), map()) :: {:noreply, map()}
  @callback handle_info(term(), map()) :: {:noreply, map()}

  defmacro __using__(_options) do
    quote do
      @behaviour Phoenix.LiveView
      import Phoenix.LiveView
      import VLLM.HEEx
    end
  end

  def assign(socket, assigns), do: update_in(socket.assigns, &Map.merge(&1, Map.new(assigns)))
end

defmodule VLLM.ExamplesTest do
  # The examples, on engines that answer from a script.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.FakeEngine

  @chat Path.expand("../examples/phoenix_chat.exs", __DIR__)

  # The page alone: the rest of the file is Phoenix's.
  {:__block__, _meta, expressions} = Code.string_to_quoted!(File.read!(@chat), file: @chat)
  page? = &match?({:defmodule, _, [{:__aliases__, _, [:Chat, :Page]} | _]}, &1)
  [_module] = expressions |> Enum.find(page?) |> Code.compile_quoted(@chat)

  # The compiler of this file does not see what that one defines.
  @compile {:no_warn_undefined, Chat.Page}

  describe "phoenix_chat.exs" do
    setup do
      script = %{
        "short" => {:deltas, ["Par", "is"]},
        "again" => &said/1,
        "long" => {:deltas, ["One, ", "two, ", :hang]},
        "wrong" => {:deltas, ["On", {:error, :overloaded, "Come back later."}]}
      }

      %{llm: VLLM.Test.start!(name: Chat.LLM, script: script), view: open()}
    end

    # What the model was told before.
    defp said(request),
      do: Enum.map_join(request.messages, " ", &"#{&1["role"]}:#{&1["content"]}")

    # A process that does for the page what LiveView does: it sends the test what is shown.
    defp open do
      test = self()

      view =
        spawn_link(fn ->
          {:ok, socket} = Chat.Page.mount(%{}, %{}, %{assigns: %{}})
          show(socket, test)
        end)

      assert_receive {:shown, [], nil, nil}
      view
    end

    defp show(%{assigns: assigns} = socket, test) do
      said = for message <- assigns.messages, do: message.content
      send(test, {:shown, said, assigns.stream && assigns.answer, assigns.note})

      {:noreply, socket} =
        receive do
          {:event, name, params} -> Chat.Page.handle_event(name, params, socket)
          message -> Chat.Page.handle_info(message, socket)
        end

      show(socket, test)
    end

    defp ask(view, question), do: send(view, {:event, "ask", %{"question" => question}})

    test "shows an answer as it is written, and goes on with the conversation", %{view: view} do
      ask(view, "short")
      for answer <- ["", "Par", "Paris"], do: assert_receive({:shown, ["short"], ^answer, nil})
      assert_receive {:shown, ["short", "Paris"], nil, nil}
      ask(view, "again")
      conversation = "user:short assistant:Paris user:again"
      assert_receive {:shown, ["short", "Paris", "again", ^conversation], nil, nil}
    end

    test "is closed in the midst of an answer, and the request is aborted", %{
      llm: llm,
      view: view
    } do
      ask(view, "long")
      assert_receive {:shown, ["long"], "One, two, ", nil}
      assert FakeEngine.in_flight(llm) == 1

      Process.unlink(view)
      Process.exit(view, :kill)
      assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)
    end

    test "gives up an answer for another question, or when told to", %{llm: llm, view: view} do
      ask(view, "long")
      assert_receive {:shown, ["long"], "One, two, ", nil}
      ask(view, "short")
      assert_receive {:shown, ["long", "One, two, ", "short", "Paris"], nil, nil}
      assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)

      ask(view, "long")
      assert_receive {:shown, [_, _, "short", "Paris", "long"], "One, two, ", nil}
      send(view, {:event, "stop", %{}})
      assert_receive {:shown, [_, _, "short", "Paris", "long", "One, two, "], nil, nil}
      assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)
    end

    test "shows what went wrong", %{view: view} do
      ask(view, "wrong")
      assert_receive {:shown, ["wrong", "On"], nil, "Come back later."}
    end
  end
end
