defmodule VLLM.RetryTest do
  # What `retry: true` does when workers die, with the fake worker.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine

  alias VLLM.Error

  @moduletag :tmp_dir

  test "without it, a request whose worker dies ends with the error" do
    llm = start!()
    assert {:error, %Error{reason: :engine_dead}} = ask(llm, "kill")
  end

  test "a request whose worker dies is run once more", %{tmp_dir: dir} do
    llm = start!()
    prompt = "once:#{dir}/died:kill;reply:at last"
    assert {:ok, "at last"} = ask(llm, prompt, retry: true)
    assert in_flight(llm) == 0
    refute_received _
  end

  test "a request that is there when a worker dies again is refused" do
    llm = start!()
    assert {:error, %Error{reason: :poison} = error} = ask(llm, "print:no;kill", retry: true)
    assert error.message =~ "run once more"
    assert error.details["reason"] == "engine_dead"
    assert error.details["first"] =~ "signal 9"
    assert List.last(error.details["log"]) == "no"
    # The engine goes on.
    assert {:ok, "again"} = ask(llm, "reply:again")
    refute_received _
  end

  test "the one that kills the worker is refused, and those who were with it are answered" do
    llm = start!()
    # In flight together, so that all of them are suspects at the first death.
    for _ <- 1..9, do: ask_in_background(llm, "hold", retry: true)
    await_held(llm, 9)
    ask_in_background(llm, "kill", retry: true)
    results = release_until_answered(llm, 10)
    assert Enum.count(results, &(&1 == {:ok, "released"})) == 9
    assert [{:error, %Error{reason: :poison}}] = results -- List.duplicate({:ok, "released"}, 9)
    assert in_flight(llm) == 0
  end

  test "suspects run again one at a time" do
    llm = start!()
    for _ <- 1..5, do: ask_in_background(llm, "hold", retry: true)
    await_held(llm, 5)
    assert {:error, %Error{reason: :engine_dead}} = ask(llm, "kill")

    for _ <- 1..5 do
      await_held(llm, 1)
      # Ordinary requests do not wait for them.
      assert {:ok, "by the way"} = ask(llm, "reply:by the way")
      assert {:ok, "released"} = ask(llm, "release")
      assert_receive {:answer, {:ok, "released"}}
    end

    assert in_flight(llm) == 0
  end

  @tag :slow
  test "a turn ends with the process that has it", %{tmp_dir: dir} do
    llm = start!()
    [first, second] = for _ <- 1..2, do: ask_in_background(llm, "hold", retry: true)
    await_held(llm, 2)
    assert {:error, %Error{reason: :engine_dead}} = ask(llm, "kill")
    await_held(llm, 1)
    Process.exit(first, :kill)
    Process.exit(second, :kill)
    await_held(llm, 0)
    assert {:ok, "next"} = ask(llm, "once:#{dir}/died:kill;reply:next", retry: true)
  end

  @tag :slow
  test "another replica takes what the first one died with", %{tmp_dir: dir} do
    llm = start!("ready", replicas: 2)
    {:ok, first} = ask(llm, "pid", session: :mine)
    prompt = "once:#{dir}/died:kill;pid"
    assert {:ok, second} = ask(llm, prompt, retry: true, session: :mine)
    assert first != second
  end

  @tag :slow
  test "the deadline is that of the whole call", %{tmp_dir: dir} do
    llm = start!()
    asked = System.monotonic_time(:millisecond)
    prompt = "once:#{dir}/died:kill;hold"
    assert {:error, %Error{reason: :timeout}} = ask(llm, prompt, retry: true, timeout: 2_000)
    assert System.monotonic_time(:millisecond) - asked >= 2_000
    await_held(llm, 0)
  end

  test "a request of a list is run again, the others are not", %{tmp_dir: dir} do
    llm = start!()
    prompts = for n <- 1..20, do: "reply:#{n}"
    prompts = prompts ++ ["once:#{dir}/died:kill;reply:21"]
    outputs = VLLM.generate!(llm, prompts, retry: true)
    assert VLLM.text(outputs) == for(n <- 1..21, do: "#{n}")
    assert in_flight(llm) == 0
    refute_received _
  end

  @tag :slow
  test "a list with a deadly prompt ends with the error, and says which it is", %{tmp_dir: dir} do
    llm = start!()
    prompts = ["once:#{dir}/held:hold;reply:a", "kill"]
    assert {:error, %Error{reason: :poison} = error} = VLLM.generate(llm, prompts, retry: true)
    assert error.details["prompt_index"] == 1
    refute_received _
  end

  test "many prompts go on around a deadly one" do
    llm = start!()
    prompts = ["reply:a", "kill", "reply:c", "reply:d"]
    results = Map.new(VLLM.generate_stream(llm, prompts, retry: true))
    assert {:error, %Error{reason: :poison}} = results[1]
    for index <- [0, 2, 3], do: assert({:ok, _} = results[index])
    refute_received _
  end

  test "an engine that vLLM says is dead is waited for to end, and counts as one death",
       %{tmp_dir: dir} do
    llm = start!()
    # As the worker does it: everybody is answered, then it ends.
    prompt = "once:#{dir}/died:dying;reply:alive"
    assert {:ok, "alive"} = ask(llm, prompt, retry: true)
  end

  @tag :slow
  test "an engine that has given up ends them with its reason" do
    llm = start!("ready", max_restarts: 0)
    assert {:error, %Error{reason: :failed}} = ask(llm, "kill", retry: true)
  end

  @tag :slow
  test "an engine that is stopped ends those who wait for a turn" do
    llm = start!("ready", shutdown_timeout: 100)
    for _ <- 1..3, do: ask_in_background(llm, "hold", retry: true)
    await_held(llm, 3)
    assert {:error, %Error{reason: :engine_dead}} = ask(llm, "kill")
    await_held(llm, 1)
    assert :ok = VLLM.stop(llm)
    reasons = for _ <- 1..3, do: reason()
    # One was in flight. The others were not, or had their turn when nothing was there any more.
    assert :shutdown in reasons
    assert Enum.all?(reasons, &(&1 in [:shutdown, :not_running]))
  end

  describe "a stream" do
    test "that has not begun is run once more", %{tmp_dir: dir} do
      llm = start!()
      prompt = "once:#{dir}/died:kill;delta:a;delta:b;reply:ab"

      assert [{:ok, %{text: "a"}}, {:ok, %{text: "b"}}] =
               Enum.to_list(VLLM.stream(llm, prompt, retry: true))

      refute_received _
    end

    test "that has begun is not", %{tmp_dir: dir} do
      llm = start!()
      prompt = "delta:a;once:#{dir}/died:kill;reply:ab"

      assert [{:ok, %{text: "a"}}, {:error, %Error{reason: :engine_dead}}] =
               Enum.to_list(VLLM.stream(llm, prompt, retry: true))
    end

    test "that kills the worker twice is refused" do
      llm = start!()

      assert [{:error, %Error{reason: :poison}}] =
               Enum.to_list(VLLM.stream(llm, "kill", retry: true))

      assert {:ok, "again"} = ask(llm, "reply:again")
    end

    @tag :slow
    test "to a process is run once more", %{tmp_dir: dir} do
      llm = start!()
      prompt = "once:#{dir}/died:kill;delta:a;reply:a"
      ref = VLLM.stream_to(llm, prompt, self(), retry: true)
      assert_receive {:vllm, ^ref, %VLLM.Delta{text: "a"}}
      assert_receive {:vllm, ^ref, {:done, output}}
      assert VLLM.text(output) == "a"
    end

    @tag :slow
    test "gives its turn back when it is left", %{tmp_dir: dir} do
      llm = start!()
      prompt = "once:#{dir}/died:kill;delta:a;hold"
      assert [{:ok, %{text: "a"}}] = Enum.take(VLLM.stream(llm, prompt, retry: true), 1)
      await_held(llm, 0)
      assert {:ok, "next"} = ask(llm, "once:#{dir}/again:kill;reply:next", retry: true)
    end
  end

  defp reason do
    assert_receive {:answer, {:error, %Error{reason: reason}}}
    reason
  end

  # Suspects come one by one, and whoever asks for their release may be there at a death.
  defp release_until_answered(_llm, 0), do: []

  defp release_until_answered(llm, count) do
    _ = ask(llm, "release")

    receive do
      {:answer, result} -> [result | release_until_answered(llm, count - 1)]
    after
      20 -> release_until_answered(llm, count)
    end
  end
end
