defmodule VLLM.EndsTest do
  # However a call ends, it ends once, and leaves nothing: no message, no
  # monitor, no place taken, nobody watched.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.Error
  alias VLLM.Engine.Table

  @moduletag :tmp_dir

  @ends VLLM.Ends.all()

  for {name, _how} <- @ends do
    test "a call that ends with: #{name}" do
      {prompt, options} = @ends[unquote(name)]
      llm = start!("ready", max_frame: 1_000_000)

      leaving_nothing(llm, fn ->
        result = ask(llm, prompt, options)
        assert match?({:ok, _}, result) or match?({:error, %Error{}}, result)
      end)
    end

    @tag :slow
    test "a stream that ends with: #{name}" do
      {prompt, options} = @ends[unquote(name)]
      llm = start!("ready", max_frame: 1_000_000)

      leaving_nothing(llm, fn ->
        events = Enum.to_list(VLLM.stream(llm, "delta:a;" <> prompt, options))
        assert Enum.count(events, &match?({:error, _}, &1)) <= 1
        assert Enum.all?(Enum.drop(events, -1), &match?({:ok, _}, &1))
      end)
    end
  end

  test "a stream that is left" do
    llm = start!()

    leaving_nothing(llm, fn ->
      assert [{:ok, %{text: "a"}}] = Enum.take(VLLM.stream(llm, "delta:a;delta:b;hold"), 1)
    end)
  end

  test "many prompts that are left" do
    llm = start!()

    leaving_nothing(llm, fn ->
      prompts = ["reply:a", "hold", "hold", "reply:d"]
      assert [_one] = Enum.take(VLLM.generate_stream(llm, prompts), 1)
    end)
  end

  test "a list that ends with the error of one of it" do
    llm = start!()

    leaving_nothing(llm, fn ->
      assert {:error, %Error{}} = VLLM.generate(llm, ["hold", "reply:x", "error:internal"])
    end)
  end

  test "a call that is refused" do
    llm = start!("ready", max_in_flight: 1, max_queue: 0)
    holder = ask_in_background(llm, "hold")
    await(fn -> in_flight(llm) == 1 end)

    leaving_nothing(llm, 1, fn ->
      assert {:error, %Error{reason: :overloaded}} = ask(llm, "reply:x")
      assert [{:error, %Error{reason: :overloaded}}] = Enum.to_list(VLLM.stream(llm, "reply:x"))
    end)

    Process.exit(holder, :kill)
    await(fn -> in_flight(llm) == 0 end)
    assert {:ok, "x"} = ask(llm, "reply:x")
  end

  test "a call whose engine is stopped" do
    llm = start!("ready", shutdown_timeout: 0)
    test = self()

    callers =
      for kind <- [:call, :stream] do
        spawn(fn ->
          {:monitors, before} = Process.info(self(), :monitors)

          case kind do
            :call ->
              {:error, %Error{reason: :shutdown}} = ask(llm, "hold")

            :stream ->
              [{:error, %Error{reason: :shutdown}}] = Enum.to_list(VLLM.stream(llm, "hold"))
          end

          send(test, {kind, self(), Process.info(self(), [:messages, :monitors]), before})
        end)
      end

    await_held(llm, 2)
    assert :ok = VLLM.stop(llm)

    for caller <- callers do
      assert_receive {_kind, ^caller, left, before}
      assert left == [messages: [], monitors: before]
    end
  end

  test "calls that find an engine whose table is gone already" do
    table = Table.new()
    {:ok, _} = Registry.register(VLLM.Registry, Gone, table)
    :ets.delete(table)

    for call <- [
          &VLLM.await_ready/1,
          &VLLM.replicas/1,
          &VLLM.engine_info/1,
          &VLLM.metrics/1,
          &VLLM.health/1,
          &VLLM.tokenize(&1, "x"),
          &VLLM.embed(&1, "x"),
          &VLLM.classify(&1, "x"),
          &VLLM.score(&1, "x", "y"),
          &VLLM.list_loras/1,
          &VLLM.scale(&1, 2),
          &VLLM.drain(&1, 1),
          &VLLM.restart/1,
          &VLLM.reload(&1, max_queue: 1),
          &VLLM.generate(&1, "x"),
          &VLLM.beam_search(&1, "x", beam_width: 2, max_tokens: 1),
          &VLLM.chat(&1, [%{role: "user", content: "x"}]),
          &List.last(Enum.to_list(VLLM.stream(&1, "x"))),
          &elem(List.last(Enum.to_list(VLLM.generate_stream(&1, ["x"]))), 1)
        ] do
      assert {:error, %Error{reason: reason}} = call.(Gone)
      assert reason in [:not_running, :shutdown]
    end
  end

  @tag :slow
  test "callers that die at any moment" do
    llm = start!("ready", max_in_flight: 64)
    :rand.seed(:exsss, {1, 2, 3})

    for round <- 1..20 do
      callers =
        for n <- 1..20 do
          prompt = if rem(n, 2) == 0, do: "hold", else: "reply:" <> String.duplicate("x", 20_000)
          spawn(fn -> if rem(n, 3) == 0, do: stream(llm, prompt), else: ask(llm, prompt) end)
        end

      if rem(round, 2) == 0, do: Process.sleep(:rand.uniform(5))
      for caller <- callers, do: Process.exit(caller, :kill)
    end

    await(fn -> in_flight(llm) == 0 end)
    await(fn -> ask(llm, "held") == {:ok, "0"} end)
    assert watched(llm) == []
  end

  defp stream(llm, prompt), do: Enum.to_list(VLLM.stream(llm, prompt))

  # Runs the function, and then has `taken` places taken and all else as before.
  defp leaving_nothing(llm, taken \\ 0, fun) do
    {:monitors, before} = Process.info(self(), :monitors)
    fun.()
    # What comes late has come when the engine has answered again.
    await(fn -> match?({:ok, _}, ask(llm, "reply:again")) or taken > 0 end)
    await(fn -> in_flight(llm) == taken end)
    assert {:monitors, ^before} = Process.info(self(), :monitors)
    assert {:messages, []} = Process.info(self(), :messages)
    await(fn -> self() not in watched(llm) end)
  end

  defp await(fun), do: assert(eventually(fun))

  # The processes that the engine's workers watch.
  defp watched(llm) do
    {:ok, table, _pid} = Table.lookup(llm)

    for %{conn: conn} <- Table.workers(table),
        {:monitors, monitors} = Process.info(conn.owner, :monitors),
        {:process, pid} <- monitors,
        do: pid
  end
end
