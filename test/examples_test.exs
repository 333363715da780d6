defmodule VLLM.ExamplesTest do
  # The examples, on engines that answer from a script.
  use ExUnit.Case, async: true

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.FakeEngine

  Code.require_file("../examples/live_stream.exs", __DIR__)

  # The compiler of this file does not see what that one defines.
  @compile {:no_warn_undefined, LiveStream}

  describe "live_stream.exs" do
    setup do
      script = %{
        "short" => {:deltas, ["Par", "is"]},
        "long" => {:deltas, ["One, ", "two, ", :hang]},
        "wrong" => {:deltas, ["On", {:error, :overloaded, "Come back later."}]}
      }

      llm = VLLM.Test.start!(script: script)
      {:ok, view} = LiveStream.start_link(llm, self())
      %{llm: llm, view: view}
    end

    test "shows an answer as it is written", %{view: view} do
      LiveStream.ask(view, "short")

      for page <- [" (writing)", "Par (writing)", "Paris (writing)", "Paris (5 tokens)"] do
        assert_receive {:rendered, ^page}
      end
    end

    test "is closed in the midst of an answer, and the request is aborted", %{
      llm: llm,
      view: view
    } do
      LiveStream.ask(view, "long")
      assert_receive {:rendered, "One, two,  (writing)"}
      assert FakeEngine.in_flight(llm) == 1

      Process.unlink(view)
      Process.exit(view, :kill)
      assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)
    end

    test "gives up an answer for another question, or when told to", %{llm: llm, view: view} do
      LiveStream.ask(view, "long")
      assert_receive {:rendered, "One, two,  (writing)"}
      LiveStream.ask(view, "short")
      assert_receive {:rendered, "Paris (5 tokens)"}
      assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)

      LiveStream.ask(view, "long")
      assert_receive {:rendered, "One, two,  (writing)"}
      LiveStream.stop(view)
      assert_receive {:rendered, "One, two,  (stopped)"}
      assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end)
    end

    test "shows what went wrong", %{view: view} do
      LiveStream.ask(view, "wrong")
      assert_receive {:rendered, "On (Come back later.)"}
    end
  end
end
