# What it gains to send requests that begin alike to the same engine, at 1, 10 and 100 engines: the library's own
# VLLM.Engine.Balancer chooses for requests to simulated engines, in virtual time. So it takes seconds.
#
#     MIX_ENV=prod mix run bench/cluster.exs
#
# An engine is what vLLM's scheduler makes of measured service times: it computes steps of up to 2,048 tokens of prompts
# and one token of each request that it has begun, and keeps what it has read in a cache that forgets what was not used
# for longest. `SERVICE=cpu` and `SERVICE=l4` are times that were measured (below), `SERVICE=5.0,0.065,0.07` are
# yours: the ms of a step, and what each request and each token of a prompt adds to it.
#
# A tenth as many callers as engines choose, each by what it knows: what it has under way itself, and of the others' what each
# engine last said, four times a second.

defmodule Bench.Cluster.Cache do
  # What an engine has read, by name: so many tokens at most, the longest unused going first.

  def new(size), do: %{free: size, entries: %{}, ages: :gb_sets.new(), now: 0}

  # How many tokens it has of what begins with these names, one after the other.
  def find(cache, names) do
    names
    |> Enum.take_while(&is_map_key(cache.entries, &1))
    |> Enum.map_reduce(cache, fn name, cache ->
      {age, tokens} = cache.entries[name]
      {tokens, note(cache, name, age, tokens)}
    end)
  end

  def put(cache, name, tokens) do
    case cache.entries do
      %{^name => {age, ^tokens}} -> note(cache, name, age, tokens)
      %{^name => {_age, _fewer}} -> cache |> drop(name) |> put(name, tokens)
      %{} -> note(%{cache | free: cache.free - tokens}, name, nil, tokens) |> make_room()
    end
  end

  defp note(%{now: now} = cache, name, age, tokens) do
    ages = :gb_sets.add({now, name}, :gb_sets.del_element({age, name}, cache.ages))
    %{cache | entries: Map.put(cache.entries, name, {now, tokens}), ages: ages, now: now + 1}
  end

  defp make_room(%{free: free} = cache) when free >= 0, do: cache

  defp make_room(cache) do
    {_age, name} = :gb_sets.smallest(cache.ages)
    cache |> drop(name) |> make_room()
  end

  defp drop(cache, name) do
    {{age, tokens}, entries} = Map.pop!(cache.entries, name)
    ages = :gb_sets.del_element({age, name}, cache.ages)
    %{cache | entries: entries, ages: ages, free: cache.free + tokens}
  end
end

defmodule Bench.Cluster.Engine do
  # One simulated engine, as a value. It works on one span at a time, which is a step, or, while it reads no prompt,
  # all steps until a request ends.

  alias Bench.Cluster.Cache

  @budget 2048
  @window 64
  @cached 200_000

  def window, do: @window

  def new(service) do
    %{
      service: service,
      queue: :queue.new(),
      reading: [],
      # {the step that is its last, when it came, request}
      writing: :gb_sets.new(),
      step: 0,
      span: nil,
      spans: 0,
      cache: Cache.new(@cached)
    }
  end

  # A request has come. Gives the engine, and when its span is over if that has changed.
  def arrive(engine, request, now) do
    engine = %{engine | queue: :queue.in(request, engine.queue)}

    case engine.span do
      nil ->
        begin(engine, now)

      # The step that it is in is the last before the new one is looked at.
      {:write, since, steps, duration} when steps > 1 ->
        passed = max(1, ceil((now - since) / duration))

        if passed < steps,
          do: span(engine, {:write, since, passed, duration}, since + passed * duration),
          else: {engine, nil}

      _a_step ->
        {engine, nil}
    end
  end

  # The span is over: gives the requests that have their first token, those that have their last, the engine, and when
  # its next span is over.
  def finish(engine, now) do
    {begun, engine} = pass(engine)
    {ended, engine} = pop_ended(engine, [])
    {engine, ends} = begin(engine, now)
    {begun, ended, engine, ends}
  end

  defp pass(%{span: {:write, _since, steps, _}} = engine),
    do: {[], %{engine | step: engine.step + steps}}

  defp pass(%{span: {:read, taken}} = engine) do
    step = engine.step + 1

    left =
      for {{request, left}, tokens} <- Enum.zip(engine.reading, taken),
          do: {request, left - tokens}

    {begun, reading} = Enum.split_with(left, fn {_request, left} -> left == 0 end)
    begun = for {request, 0} <- begun, do: request
    engine = %{engine | step: step, reading: reading}

    {begun,
     Enum.reduce(begun, engine, fn request, engine ->
       # The beginning that others share is the last to be forgotten.
       cache =
         for {name, tokens} <- Enum.reverse(request.parts), reduce: engine.cache do
           cache -> Cache.put(cache, name, tokens)
         end

       last = {step + request.answer - 1, request.id, request}
       %{engine | cache: cache, writing: :gb_sets.add(last, engine.writing)}
     end)}
  end

  defp pop_ended(engine, ended) do
    with false <- :gb_sets.is_empty(engine.writing),
         {{last, _id, request}, writing} when last <= engine.step <-
           :gb_sets.take_smallest(engine.writing) do
      pop_ended(%{engine | writing: writing}, [request | ended])
    else
      _none -> {ended, engine}
    end
  end

  defp begin(engine, now) do
    engine = admit(engine)
    %{service: {step, request, token}, reading: reading, writing: writing} = engine
    duration = step + request * :gb_sets.size(writing)

    cond do
      reading != [] ->
        {taken, left} =
          Enum.map_reduce(reading, @budget, fn {_, left}, budget ->
            {min(left, budget), budget - min(left, budget)}
          end)

        span(engine, {:read, taken}, now + duration + token * (@budget - left))

      :gb_sets.is_empty(writing) ->
        {%{engine | span: nil}, nil}

      true ->
        {last, _id, _request} = :gb_sets.smallest(writing)
        steps = last - engine.step
        span(engine, {:write, now, steps, duration}, now + steps * duration)
    end
  end

  # Whoever waits for the end of an earlier span finds another number.
  defp span(engine, span, ends),
    do: {%{engine | span: span, spans: engine.spans + 1}, ends}

  defp admit(engine) do
    with true <- length(engine.reading) + :gb_sets.size(engine.writing) < @window,
         {{:value, request}, queue} <- :queue.out(engine.queue) do
      {found, cache} = Cache.find(engine.cache, for({name, _} <- request.parts, do: name))
      hit = min(Enum.sum(found), request.prompt - 1)
      request = %{request | hit: hit}
      reading = engine.reading ++ [{request, request.prompt - hit}]
      admit(%{engine | queue: queue, cache: cache, reading: reading})
    else
      _full_or_none -> engine
    end
  end
end

defmodule Bench.Cluster do
  alias Bench.Cluster.Engine
  alias VLLM.Engine.{Balancer, Call}

  # Ms of a step, of each request in it, and of each token of a prompt.
  @services %{
    # Qwen2.5-0.5B in bf16 on one thread: 13 tokens/s of one sequence, 122 of 16, 257 of a prompt of 512.
    "cpu" => {72.0, 3.7, 3.9},
    # Qwen2.5-0.5B in bf16 on an NVIDIA L4 with vLLM 0.23: https://ai.wmx.dev/benchmarks, 2026.
    "l4" => {5.0, 0.065, 0.08}
  }

  @report 250.0
  @engines [1, 10, 100]
  # `:two` is the library's choice for requests that belong nowhere. `:random` and `:least_busy` it does not do.
  @policies [:random, :least_busy, :two, :prefix]

  # Tokens.
  @instructions 2000
  @question 100
  @answer 128

  # So many tasks with instructions of their own for each engine, the n-th asked 1/n as often as the first.
  @tasks 100
  @turns 6

  def run do
    service = service(System.get_env("SERVICE", "l4"))

    for {traffic, title} <- [
          tasks: "tasks with instructions of their own",
          talks: "conversations"
        ] do
      IO.puts(
        "\n#{title}\n\nengines  policy      cached  TTFT p50    p95    p99  E2E p99  busiest  choice"
      )

      for n <- @engines, policy <- @policies, do: simulate(traffic, n, policy, service)
    end
  end

  defp service(given) do
    @services[given] ||
      given |> String.split(",") |> Enum.map(&elem(Float.parse(&1), 0)) |> List.to_tuple()
  end

  # As many requests for each engine, at a rate at which one that reads all prompts whole could not keep up.
  defp simulate(traffic, n, policy, {step, _, token} = service) do
    :rand.seed(:exsss, 7)
    per_engine = 400
    interval = 0.8 * (token * @instructions + 2 * step) / n

    state = %{
      traffic: traffic,
      policy: policy,
      callers: max(1, div(n, 10)),
      engines: for(i <- 1..n, into: %{}, do: {i, Engine.new(service)}),
      # Under way, as it is, as it was last said, and how it changed since for whom.
      loads: for(i <- 1..n, into: %{}, do: {i, 0}),
      said: for(i <- 1..n, into: %{}, do: {i, 0}),
      since: %{},
      events: :gb_sets.new(),
      made: 0,
      think: 20 * interval * n,
      tasks: if(traffic == :tasks, do: weights(@tasks * n)),
      first: %{},
      done: [],
      choosing: []
    }

    openings = if traffic == :tasks, do: per_engine * n, else: div(per_engine * n, @turns)
    spacing = if traffic == :tasks, do: interval, else: interval * @turns

    state =
      Enum.reduce(1..openings, {0.0, state}, fn id, {at, state} ->
        at = at - spacing * :math.log(:rand.uniform_real())
        {at, post(state, at, {:arrive, opening(state, id)})}
      end)
      |> elem(1)

    state |> post(@report, :report) |> loop() |> report(n)
  end

  defp weights(count) do
    {sums, _} = Enum.map_reduce(1..count, 0.0, fn n, sum -> {sum + 1 / n, sum + 1 / n} end)
    List.to_tuple(sums)
  end

  # The first whose sum of weights is not less.
  defp draw(sums),
    do: draw(sums, :rand.uniform() * elem(sums, tuple_size(sums) - 1), 0, tuple_size(sums) - 1)

  defp draw(_sums, _x, at, at), do: at

  defp draw(sums, x, low, high) do
    middle = div(low + high, 2)

    if elem(sums, middle) < x,
      do: draw(sums, x, middle + 1, high),
      else: draw(sums, x, low, middle)
  end

  ## Requests: parts that others may share, each with a name

  defp opening(%{traffic: :tasks, tasks: tasks, callers: callers}, id) do
    task = draw(tasks)

    request(id, callers, [{{:task, task}, @instructions}, {{:once, id}, @question + @answer}], %{
      prompt: @instructions + @question,
      params: %{"prompt" => "Task #{task}. " <> String.duplicate("x", 128)},
      call: Call.new(%{timeout: :infinity})
    })
  end

  defp opening(%{traffic: :talks, callers: callers}, id), do: turn(id, callers, id, 1)

  defp turn(id, callers, talk, turn) do
    said = (turn - 1) * (@question + @answer)
    parts = [{:instructions, @instructions}, {{:talk, talk}, said + @question + @answer}]

    request(id, callers, parts, %{
      prompt: @instructions + said + @question,
      params: %{"prompt" => ""},
      call: Call.new(%{timeout: :infinity, session: talk}),
      talk: talk,
      turn: turn
    })
  end

  defp request(id, callers, parts, more) do
    Map.merge(
      %{
        id: id,
        caller: rem(id, callers),
        parts: parts,
        answer: @answer,
        hit: 0,
        at: nil,
        engine: nil
      },
      more
    )
  end

  ## Time

  defp post(state, at, event),
    do: %{
      state
      | events: :gb_sets.add({at, state.made, event}, state.events),
        made: state.made + 1
    }

  defp loop(state) do
    if :gb_sets.is_empty(state.events) do
      state
    else
      {{now, _, event}, events} = :gb_sets.take_smallest(state.events)
      %{state | events: events} |> handle(event, now) |> loop()
    end
  end

  defp handle(state, :report, now) do
    state = %{state | said: state.loads, since: %{}}
    # The last thing that there is.
    if :gb_sets.is_empty(state.events), do: state, else: post(state, now + @report, :report)
  end

  defp handle(state, {:arrive, request}, now) do
    {index, state} = choose(state, request)
    request = %{request | at: now, engine: index}
    {engine, ends} = Engine.arrive(state.engines[index], request, now)
    state |> count(request, 1) |> follow(index, engine, ends)
  end

  defp handle(state, {:span, index, number}, now) do
    case state.engines[index] do
      %{spans: ^number} = engine ->
        {begun, ended, engine, ends} = Engine.finish(engine, now)
        first = Enum.reduce(begun, state.first, &Map.put(&2, &1.id, now - &1.at))
        state = follow(%{state | first: first}, index, engine, ends)
        Enum.reduce(ended, state, &finish(&2, &1, now))

      _another ->
        state
    end
  end

  defp follow(state, index, engine, ends) do
    state = put_in(state.engines[index], engine)
    if ends, do: post(state, ends, {:span, index, engine.spans}), else: state
  end

  defp finish(state, request, now) do
    {first, firsts} = Map.pop!(state.first, request.id)
    one = {request.at, request.engine, request.hit / request.prompt, first, now - request.at}
    state = count(%{state | first: firsts, done: [one | state.done]}, request, -1)

    case request do
      %{talk: talk, turn: turn} when turn < @turns ->
        id = request.id + 1_000_000
        post(state, now + state.think, {:arrive, turn(id, state.callers, talk, turn + 1)})

      _last ->
        state
    end
  end

  ## Choosing

  defp choose(%{policy: :random} = state, _request),
    do: {:rand.uniform(map_size(state.engines)), state}

  defp choose(%{policy: :least_busy} = state, request) do
    # Of several that are, any.
    indexes = Enum.shuffle(Map.keys(state.said))
    {Enum.min_by(indexes, &load(state, request, &1)), state}
  end

  defp choose(state, request) do
    loads =
      for {index, _} <- state.said,
          do: {load(state, request, index), %{index: index, window: Engine.window()}}

    params = if state.policy == :prefix, do: request.params, else: %{}
    call = if state.policy == :prefix, do: request.call, else: %{request.call | session: nil}
    began = System.monotonic_time(:nanosecond)
    one = Balancer.choose_reported(loads, params, call, nil)
    took = System.monotonic_time(:nanosecond) - began
    {one.index, %{state | choosing: [took | state.choosing]}}
  end

  defp load(state, request, index),
    do: state.said[index] + Map.get(state.since, {request.caller, index}, 0)

  defp count(state, %{engine: index, caller: caller}, change) do
    %{
      state
      | loads: Map.update!(state.loads, index, &(&1 + change)),
        since: Map.update(state.since, {caller, index}, change, &(&1 + change))
    }
  end

  ## Figures, without the first quarter, in which caches fill

  defp report(state, n) do
    done = state.done |> Enum.sort() |> Enum.drop(div(length(state.done), 4))

    at = fn place, share ->
      done
      |> Enum.map(&elem(&1, place))
      |> Enum.sort()
      |> Enum.at(floor(share * (length(done) - 1)))
    end

    cached = Enum.sum(for one <- done, do: elem(one, 2)) / length(done)
    busiest = done |> Enum.frequencies_by(&elem(&1, 1)) |> Map.values() |> Enum.max()
    choice = state.choosing |> Enum.sort() |> Enum.at(div(length(state.choosing), 2))

    columns = [
      String.pad_leading("#{n}", 7),
      "  " <> String.pad_trailing("#{state.policy}", 11),
      pad("#{round(100 * cached)} %", 7),
      for(
        {place, share, width} <- [{3, 0.5, 10}, {3, 0.95, 7}, {3, 0.99, 7}, {4, 0.99, 9}],
        do: pad("#{round(at.(place, share))}", width)
      ),
      pad("#{Float.round(busiest * n / length(done), 2)}", 9),
      pad(if(choice, do: "#{Float.round(choice / 1000, 1)} µs", else: ""), 9)
    ]

    IO.puts(columns)
  end

  defp pad(text, width), do: String.pad_leading(text, width)
end

Bench.Cluster.run()
