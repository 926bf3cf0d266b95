def cheapest(experts, x_T, routes):
    return 'views'
