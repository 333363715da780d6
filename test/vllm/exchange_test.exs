defmodule VLLM.ExchangeTest do
  use ExUnit.Case, async: true

  import VLLM.FakeEngine
  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{Error, Exchange}
  alias VLLM.Engine.Call

  @moduletag :tmp_dir

  defp request(llm, steps, options \\ []) do
    body = ~s({"model": "m", "prompt": "#{steps}"})
    params = %{"method" => "POST", "path" => "/v1/completions", "model" => "m", "body" => body}
    call = Call.new(Map.merge(%{timeout: 60_000}, Map.new(options)))
    Exchange.request(llm, params, call)
  end

  defp pieces(body), do: for({:ok, piece} <- body, do: piece)

  test "an answer in one piece, whatever its status" do
    llm = start!()
    assert {:ok, {200, headers, "yes"}} = request(llm, "answer:200:yes")
    assert {"content-type", "application/json"} in headers
    assert {:ok, {404, _headers, "no"}} = request(llm, "answer:404:no")
  end

  test "an answer that comes bit by bit is read as it comes" do
    llm = start!()
    assert {:ok, {200, headers, body}} = request(llm, "head:200;chunk:one;chunk:two;hold")
    assert headers == [{"content-type", "text/event-stream"}]
    # Leaving it has it cancelled.
    assert Enum.take(body, 2) == [{:ok, "one"}, {:ok, "two"}]
    await_held(llm, 0)

    assert {:ok, {200, _headers, body}} = request(llm, "head:200;chunk:one;end")
    assert Enum.to_list(body) == [{:ok, "one"}]
    assert in_flight(llm) == 0
  end

  test "what is read is acknowledged, a half of the credit at once" do
    llm = start!()
    chunks = String.duplicate("chunk:x;", 127)
    assert {:ok, {200, _headers, body}} = request(llm, "head:200;#{chunks}end")
    assert length(pieces(body)) == 127
    assert {:ok, "128"} = ask(llm, "credit")
  end

  test "a worker that dies in the middle ends the body with an error" do
    llm = start!()
    assert {:ok, {200, _headers, body}} = request(llm, "head:200;chunk:one;kill", retry: true)
    assert [{:ok, "one"}, {:error, %Error{reason: :engine_dead}}] = Enum.to_list(body)
    # And the next one is served after the restart.
    assert {:ok, {200, _headers, "yes"}} = request(llm, "answer:200:yes")
  end

  test "what has no head yet when the worker dies is asked again", %{tmp_dir: tmp_dir} do
    steps = "once:#{tmp_dir}/died:kill;answer:200:yes"
    assert {:ok, {200, _headers, "yes"}} = request(start!(), steps, retry: true)
    steps = "once:#{tmp_dir}/again:kill;answer:200:yes"
    assert {:error, %Error{reason: :engine_dead}} = request(start!(), steps)
  end

  test "a caller that dies has its request cancelled, and a deadline too" do
    llm = start!()
    {caller, monitor} = spawn_monitor(fn -> request(llm, "hold") end)
    await_held(llm, 1)
    Process.exit(caller, :kill)
    assert_receive {:DOWN, ^monitor, :process, _pid, :killed}
    await_held(llm, 0)
    assert {:error, %Error{reason: :timeout}} = request(llm, "hold", timeout: 50)
    await_held(llm, 0)
  end

  test "what the engine refuses, and what is more than it takes" do
    llm = start!("ready", max_in_flight: 1, max_queue: 0)
    assert {:error, %Error{reason: :unsupported}} = request(llm, "error:unsupported")
    ask_in_background(llm, "hold")
    assert eventually(fn -> in_flight(llm) == 1 end)
    assert {:error, %Error{reason: :overloaded} = error} = request(llm, "answer:200:yes")
    assert error.details["retry_after_ms"] > 0
  end

  for {what, steps} <- [
        {"a delta of text", "delta:text;hold"},
        {"an answer without a head", "head:200;reply:no;hold"},
        {"a status that there is not", "answer:7:no"}
      ] do
    test "#{what} is none of an answer over HTTP" do
      case request(start!(), unquote(steps)) do
        {:ok, {200, _headers, body}} ->
          assert [{:error, %Error{reason: :protocol}}] = Enum.to_list(body)

        {:error, error} ->
          assert error.reason == :protocol
      end
    end
  end
end
