defmodule VLLM.LimitsTest do
  # What ends a request before its answer, and what keeps one out, with the fake
  # worker.
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess

  alias VLLM.{Delta, Error}

  describe "inter_token_timeout" do
    test "ends a stream that has stalled, says so, and has it aborted" do
      llm = start!()
      stream = VLLM.stream(llm, "delta:a;hold", inter_token_timeout: 200)
      assert [{:ok, %Delta{text: "a"}}, {:error, error}] = Enum.to_list(stream)
      assert %Error{reason: :timeout, details: %{"option" => "inter_token_timeout"}} = error
      assert error.message =~ "200 ms"
      await_held(llm, 0)
      refute_received _
    end

    test "does not count before the first delta; the deadline says that it was the deadline" do
      llm = start!()
      options = [inter_token_timeout: 10, timeout: 300]
      assert [{:error, error}] = Enum.to_list(VLLM.stream(llm, "hold", options))
      assert %Error{reason: :timeout, details: %{"option" => "timeout"}} = error
      await_held(llm, 0)
    end

    test "gives way to a deadline that is earlier" do
      llm = start!()
      options = [inter_token_timeout: 60_000, timeout: 1_500]
      stream = VLLM.stream(llm, "delta:a;hold", options)
      assert [{:ok, _}, {:error, %Error{reason: :timeout} = error}] = Enum.to_list(stream)
      assert error.details == %{"option" => "timeout"}
    end

    test "does not count what the reader takes" do
      llm = start!()
      prompt = Enum.map_join(1..40, ";", &"delta:#{&1}") <> ";reply:done"
      stream = VLLM.stream(llm, prompt, inter_token_timeout: 2_000)

      texts =
        for {:ok, delta} <- stream do
          # All of them are here when the reader comes for the next.
          if delta.text == "3", do: Process.sleep(2_100)
          delta.text
        end

      assert texts == for(n <- 1..40, do: "#{n}")
    end

    test "ends a stream to a process, unless that is busy" do
      llm = start!()
      ref = VLLM.stream_to(llm, "delta:a;hold", self(), inter_token_timeout: 200)
      assert_receive {:vllm, ^ref, %Delta{text: "a"}}
      assert_receive {:vllm, ^ref, {:error, error}}
      assert error.details["option"] == "inter_token_timeout"
      await_held(llm, 0)

      for n <- 1..100, do: send(self(), {:busy, n})
      ref = VLLM.stream_to(llm, "delta:a;delta:b;reply:ab", self(), inter_token_timeout: 200)
      Process.sleep(400)
      for n <- 1..100, do: assert_receive({:busy, ^n})
      assert_receive {:vllm, ^ref, %Delta{text: "a"}}
      assert_receive {:vllm, ^ref, %Delta{text: "b"}}
      assert_receive {:vllm, ^ref, {:done, _}}
    end

    test "is for streams only" do
      llm = start!()

      assert {:error, %Error{reason: :invalid_option}} =
               VLLM.generate(llm, "reply:x", inter_token_timeout: 10)
    end
  end

  describe "queue_timeout" do
    test "reaches the worker in seconds, and only where it was given" do
      llm = start!()
      assert {:ok, seconds} = ask(llm, "param:queue_timeout", queue_timeout: 60_000)
      assert String.to_float(seconds) > 30 and String.to_float(seconds) <= 60
      assert {:ok, "None"} = ask(llm, "param:queue_timeout")
    end

    test "that the worker reports is an error of its own" do
      llm = start!()

      assert {:error, %Error{reason: :queue_timeout}} =
               ask(llm, "error:queue_timeout", queue_timeout: 10)
    end

    test "counts the wait for an engine that starts" do
      start_supervised!({VLLM.FakeEngine, name: StartsForever, model: "hang"})
      options = [queue_timeout: 200, timeout: 60_000]
      assert {:error, %Error{reason: :queue_timeout} = error} = ask(StartsForever, "x", options)
      assert error.message =~ "200 ms"

      assert [{:error, %Error{reason: :queue_timeout}}] =
               Enum.to_list(VLLM.stream(StartsForever, "x", options))

      assert [{0, {:error, %Error{reason: :queue_timeout}}}] =
               Enum.to_list(VLLM.generate_stream(StartsForever, ["x"], options))

      assert {:error, %Error{reason: :timeout, details: %{"option" => "timeout"}}} =
               ask(StartsForever, "x", queue_timeout: 60_000, timeout: 200)
    end

    test "counts for each prompt of a list from when it is sent" do
      llm = start!("ready", max_in_flight: 1)
      prompts = ["sleep:0.5;reply:a", "param:queue_timeout"]
      assert {:ok, outputs} = VLLM.generate(llm, prompts, queue_timeout: 60_000)
      assert [_, seconds] = VLLM.text(outputs)
      assert String.to_float(seconds) > 30
    end
  end

  describe "overload" do
    test "says when to try again, by how fast requests end" do
      llm = start!("ready", max_in_flight: 2, max_queue: 0)
      for _ <- 1..2, do: ask_in_background(llm, "hold")
      assert eventually(fn -> in_flight(llm) == 2 end)
      # Nothing has ended yet.
      assert {:error, %Error{reason: :overloaded} = error} = ask(llm, "reply:x")
      assert error.details == %{"limit" => 2, "retry_after_ms" => 1000, "prompt_index" => 0}
    end

    test "does not count the requests that are refused" do
      llm = start!("ready", max_in_flight: 2, max_queue: 0)
      for _ <- 1..2, do: ask_in_background(llm, "hold")
      assert eventually(fn -> in_flight(llm) == 2 end)
      for _ <- 1..20, do: assert({:error, %Error{reason: :overloaded}} = ask(llm, "release"))
      assert in_flight(llm) == 2
      refute_received _
      [{worker, _program}] = workers(llm)
      # Only those that wait are watched, and none of them is this one.
      {:monitors, monitors} = Process.info(worker, :monitors)
      refute {:process, self()} in monitors
    end
  end

  describe "a worker that does not read" do
    test "suspends nobody: each call ends, and the rest is answered when it reads again" do
      # Room for ten requests of 1 MB.
      llm = start!("ready", max_unsent: 10_000_000)
      [{_worker, program}] = workers(llm)
      fake = worker_pid(program)
      assert signal("STOP", fake)
      prompt = "reply:" <> String.duplicate("x", 1_000_000)

      for _ <- 1..20, do: ask_in_background(llm, prompt, timeout: 1_000)
      impatient = for _ <- 1..20, do: answer()
      assert Enum.all?(impatient, &match?({:error, %Error{}}, &1))
      reasons = Enum.frequencies_by(impatient, fn {:error, error} -> error.reason end)
      assert Map.keys(reasons) -- [:timeout, :overloaded] == []
      assert reasons[:overloaded] > 0 and reasons[:timeout] > 0

      # Nothing that was left behind counts against those who come now, but it is still to be read.
      assert {:error, %Error{reason: :overloaded} = error} = ask(llm, prompt)
      assert error.message =~ "max_unsent:"
      assert error.details["retry_after_ms"] > 0

      for _ <- 1..10, do: ask_in_background(llm, "reply:small")
      assert eventually(fn -> in_flight(llm) >= 10 end)
      assert signal("CONT", fake)
      for _ <- 1..10, do: assert_receive({:answer, {:ok, "small"}})
      assert {:ok, "x" <> _} = ask(llm, prompt)
      assert eventually(fn -> in_flight(llm) == 0 end)
      refute_received _
    end

    test "is told of a cancel, however much waits already" do
      llm = start!("ready", max_unsent: 2_000_000)
      holder = ask_in_background(llm, "hold")
      await_held(llm, 1)
      [{_worker, program}] = workers(llm)
      fake = worker_pid(program)
      assert signal("STOP", fake)
      prompt = "reply:" <> String.duplicate("x", 1_000_000)
      callers = for _ <- 1..5, do: ask_in_background(llm, prompt, timeout: 500)
      for _ <- 1..5, do: assert_receive({:answer, {:error, _}})
      Process.exit(holder, :kill)
      # Other tests may ask all engines of this BEAM for their metrics meanwhile.
      assert eventually(fn -> not Enum.any?([holder | callers], &in_flight?(llm, &1)) end)
      assert signal("CONT", fake)
      await_held(llm, 0)
    end
  end

  defp in_flight?(llm, caller) do
    {:ok, table, _pid} = VLLM.Engine.Table.lookup(llm)
    [%{conn: conn}] = VLLM.Engine.Table.workers(table)
    :ets.match(conn.routes, {:_, :_, caller, :_, :_, :_}) != []
  end

  defp answer do
    assert_receive {:answer, result}
    result
  end
end
