defmodule VLLM.Chaos.Caller do
  @moduledoc """
  A process that makes one call after another and notes how each ended: exactly one outcome for
  each request, and nothing in its mailbox in between.
  """

  alias VLLM.Chaos.Plan
  alias VLLM.{Delta, Error}

  @doc "Starts one, monitored; it ends when enough has been asked and all faults have happened."
  def start(run), do: spawn_monitor(fn -> loop(run) end)

  defp loop(run) do
    number = :atomics.add_get(run.counters, 1, 1)

    if number <= run.plan.requests or :atomics.get(run.counters, 2) == 0 do
      request = request(run, number)
      :ets.insert(run.calls, {self(), number, deadline(request.timeout)})
      :atomics.add(run.counters, 3, 1)
      if request.fault == :death, do: die_in(draw(request, :moment, run.patience))
      outcome = serve(run, request)
      late = System.monotonic_time(:millisecond) - :ets.lookup_element(run.calls, self(), 3)
      note(run, number, outcome, late)
      strays(run, number)
      # Its killer may be on the way, and is for this request only.
      unless request.fault == :death do
        pause(run, request)
        loop(run)
      end
    end
  end

  @doc "Notes how a request ended; a second end of the same one is a fault of its own."
  def note(run, number, outcome, late \\ 0) do
    unless :ets.insert_new(run.outcomes, {number, outcome, late}) do
      :ets.insert(run.violations, {make_ref(), {:ended_twice, number, outcome}})
    end
  end

  defp strays(run, number) do
    receive do
      message ->
        :ets.insert(run.violations, {make_ref(), {:stray_message, number, message}})
        strays(run, number)
    after
      0 -> :ok
    end
  end

  defp die_in(ms) do
    caller = self()

    spawn(fn ->
      receive do
      after
        ms -> Process.exit(caller, :kill)
      end
    end)
  end

  # So that so many callers make so many requests a second at most.
  defp pause(run, request) do
    receive do
    after
      draw(request, :pause, 2 * run.pause + 1) -> :ok
    end
  end

  ## What is asked

  defp request(run, number) do
    fault = run.plan.callers[number]

    %{
      number: number,
      seed: run.plan.seed,
      fault: fault,
      timeout: timeout(run, number, fault),
      retry: Plan.pick(run.plan, number, :retry, [true, false]),
      call: call(run, number, fault)
    }
  end

  defp draw(request, what, limit), do: Plan.draw({request.seed, request.number, what}, limit)

  defp timeout(run, number, :deadline) do
    1 + Plan.draw({run.plan.seed, number, :timeout}, run.patience)
  end

  # One in ten has little time, most have enough for a restart.
  defp timeout(run, number, _fault) do
    Plan.pick(run.plan, number, :timeout, [run.timeout / 20 | List.duplicate(run.timeout, 9)])
    |> round()
  end

  defp call(run, number, :malformed) do
    {prompt, options, reasons} = Plan.pick(run.plan, number, :question, run.bank.malformed)
    way = Plan.pick(run.plan, number, :way, [:generate, :stream])
    {:malformed, way, prompt, options, reasons}
  end

  defp call(run, number, :cancel) do
    way = Plan.pick(run.plan, number, :way, [:stream, :stream_to])
    question = Plan.pick(run.plan, number, :question, run.bank.long_streams)
    {:leave, way, question, 1 + rem(number, 2)}
  end

  defp call(run, number, fault) when fault in [:death, :deadline] do
    way = Plan.pick(run.plan, number, :way, [:generate, :stream, :stream_to])
    bank = if way == :generate, do: run.bank.long, else: run.bank.long_streams
    {:long, way, Plan.pick(run.plan, number, :question, bank)}
  end

  defp call(run, number, nil) do
    ways = [:generate, :generate, :list, :stream, :stream_to, :chat, :chat_stream, :tokenize]
    ways = Enum.reject(ways, &(run.bank[bank_of(&1)] == []))
    way = Plan.pick(run.plan, number, :way, ways)
    bank = run.bank[bank_of(way)]

    case way do
      :list -> {:list, for(n <- 1..3, do: Plan.pick(run.plan, number, {:question, n}, bank))}
      :tokenize -> {:tokenize, Plan.pick(run.plan, number, :question, bank)}
      way -> {:whole, way, Plan.pick(run.plan, number, :question, bank)}
    end
  end

  defp bank_of(way) when way in [:generate, :list], do: :prompts
  defp bank_of(way) when way in [:stream, :stream_to], do: :streams
  defp bank_of(way) when way in [:chat, :chat_stream], do: :chats
  defp bank_of(:tokenize), do: :texts

  ## What comes of it

  defp serve(run, %{call: {:list, questions}} = request) do
    {prompts, right} = Enum.unzip(questions)

    case VLLM.generate(run.llm, prompts, options(run.bank.options, request)) do
      {:ok, outputs} -> verdict(VLLM.text(outputs), right, &==/2)
      {:error, error} -> refused(run, error, [])
    end
  end

  defp serve(run, %{call: {:tokenize, text}} = request) do
    deadline = deadline(request.timeout)
    left = fn -> [timeout: max(deadline - System.monotonic_time(:millisecond), 1)] end

    with {:ok, ids} <- VLLM.tokenize(run.llm, text, left.()),
         {:ok, again} <- VLLM.detokenize(run.llm, ids, left.()) do
      verdict(again, text, &==/2)
    else
      {:error, error} -> refused(run, error, [])
    end
  end

  defp serve(run, %{call: {:whole, way, {prompt, right}}} = request) do
    case ask(run, way, prompt, options(run.bank.options, request)) do
      {:ok, text} -> verdict(text, right, &==/2)
      {:error, error, text} -> broken_off(run, error, text, right, [])
    end
  end

  defp serve(run, %{call: {:long, way, {prompt, beginning}}} = request) do
    case ask(run, way, prompt, options(run.bank.long_options, request)) do
      {:ok, text} -> verdict(text, beginning, &String.starts_with?/2)
      {:error, error, text} -> broken_off(run, error, text, beginning, [])
    end
  end

  defp serve(run, %{call: {:leave, way, {prompt, beginning}, count}} = request) do
    case leave(run, way, prompt, options(run.bank.long_options, request), count) do
      {:left, text} -> if begins?(text, beginning), do: :left, else: {:wrong, text, beginning}
      {:error, error, text} -> broken_off(run, error, text, beginning, [])
    end
  end

  defp serve(run, %{call: {:malformed, way, prompt, options, reasons}} = request) do
    case ask(run, way, prompt, options(options, request)) do
      {:ok, text} -> {:wrong, text, reasons}
      {:error, error, ""} -> refused(run, error, reasons)
    end
  end

  defp options(options, request) do
    [timeout: request.timeout, retry: request.retry] ++ options
  end

  defp verdict(text, right, same?) do
    if same?.(text, right), do: :answered, else: {:wrong, text, right}
  end

  # What had come before the error must have been right.
  defp broken_off(run, error, text, right, reasons) do
    if begins?(text, right), do: refused(run, error, reasons), else: {:wrong, text, right}
  end

  defp begins?(text, right) do
    String.starts_with?(right, text) or String.starts_with?(text, right)
  end

  defp refused(_run, %Error{reason: :timeout}, _reasons), do: :deadline

  # What a malformed request may hear; or that the engine is away.
  defp refused(run, %Error{reason: reason} = error, reasons) do
    if reason in reasons or reason in run.away, do: {:error, reason}, else: {:unexpected, error}
  end

  ## The ways to ask

  defp ask(run, :generate, prompt, options) do
    case VLLM.generate(run.llm, prompt, options) do
      {:ok, [output]} -> {:ok, VLLM.text(output)}
      {:error, error} -> {:error, error, ""}
    end
  end

  defp ask(run, :chat, text, options) do
    case VLLM.chat(run.llm, [%{role: "user", content: text}], options) do
      {:ok, [output]} -> {:ok, VLLM.text(output)}
      {:error, error} -> {:error, error, ""}
    end
  end

  defp ask(run, :stream, prompt, options), do: read(VLLM.stream(run.llm, prompt, options))

  defp ask(run, :chat_stream, text, options) do
    read(VLLM.chat_stream(run.llm, [%{role: "user", content: text}], options))
  end

  defp ask(run, :stream_to, prompt, options) do
    receive_all(VLLM.stream_to(run.llm, prompt, self(), options), "")
  end

  defp read(stream) do
    Enum.reduce(stream, {:ok, ""}, fn
      {:ok, %Delta{text: more}}, {:ok, text} -> {:ok, text <> more}
      {:error, error}, {:ok, text} -> {:error, error, text}
    end)
  end

  defp receive_all(ref, text) do
    receive do
      {:vllm, ^ref, %Delta{text: more}} -> receive_all(ref, text <> more)
      {:vllm, ^ref, {:done, output}} -> whole(text, VLLM.text(output))
      {:vllm, ^ref, {:error, error}} -> {:error, error, text}
    end
  end

  # The bits and the whole say the same, or neither is an answer.
  defp whole(text, text), do: {:ok, text}
  defp whole(text, other), do: {:ok, "bits: #{inspect(text)}, whole: #{inspect(other)}"}

  defp leave(run, :stream, prompt, options, count) do
    deltas = Enum.take(VLLM.stream(run.llm, prompt, options), count)
    text = for {:ok, delta} <- deltas, into: "", do: delta.text

    case List.last(deltas) do
      {:error, error} -> {:error, error, text}
      _ -> {:left, text}
    end
  end

  defp leave(run, :stream_to, prompt, options, count) do
    ref = VLLM.stream_to(run.llm, prompt, self(), options)

    1..count
    |> Enum.reduce_while({:left, ""}, fn _, {:left, text} ->
      receive do
        {:vllm, ^ref, %Delta{text: more}} -> {:cont, {:left, text <> more}}
        {:vllm, ^ref, {:done, _output}} -> {:halt, {:left, text}}
        {:vllm, ^ref, {:error, error}} -> {:halt, {:error, error, text}}
      end
    end)
    |> tap(fn _ -> VLLM.cancel(ref) end)
  end

  defp deadline(timeout), do: System.monotonic_time(:millisecond) + timeout
end
